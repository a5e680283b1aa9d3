"""ALPS (arXiv 2406.07831): the support is found by ADMM, and the weights on it by conjugate gradients.

Inputs are scaled to unit norm: W becomes W S and H becomes S^-1 H S^-1, with S the roots of H's diagonal. Everything below
is in these terms, and rows are outputs: a linear is (out_features, in_features) as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, without
from secateur.pruning.methods.factor import Factor, inverse_factor
from secateur.pruning.methods.sparsegpt import sparsegpt
from secateur.pruning.statistics import STRIP, Gram, Statistics
from secateur.recipes import ALPS, SparseGPT

FIRST_PENALTY = 0.1  # rho
CHECK_EVERY = 3  # iterations, and then rho changes with how much of the support did
MANY, SOME = 0.1, 0.005  # of the kept weights changed: rho grows by 1.3, by 1.2, or else by 1.1
SETTLED, EARLIEST = 3e-4, 30  # the support has settled once so few change, after so many iterations
CG_TOLERANCE = 1e-4  # of the residual, relative to the right hand side


@dataclass(frozen=True, slots=True)
class Problem:
    """What linears with the same input share.

    `hessian`: H, damped and scaled to a unit diagonal, (in_features, in_features); `values`, (in_features,), and
    `vectors`, (in_features, in_features): its eigenvalues and eigenvectors. `scale`: S, (in_features,). `factor`: what
    SparseGPT needs of the same inputs.
    """

    hessian: Tensor
    values: Tensor
    vectors: Tensor
    scale: Tensor
    factor: Factor


def problem_of(factor: Factor) -> Problem:
    """The problem with the damping that `factor` was found with: one eigendecomposition."""
    hessian = factor.gram.clone()
    hessian.diagonal().add_(factor.damping + factor.dead.to(hessian.dtype))
    scale = hessian.diagonal().sqrt()
    hessian.div_(scale).div_(scale.unsqueeze(1))
    values, vectors = torch.linalg.eigh(hessian)
    return Problem(hessian, values, vectors, scale, factor)


def alps(weight: Tensor, target: Target, problem: Problem, parameters: ALPS) -> tuple[Tensor, Tensor]:
    """Prune one linear, (out_features, in_features).

    Returns the weight, in the dtype of the problem, and the mask of what was removed.
    """
    dense = weight * problem.scale
    dense[:, problem.factor.dead] = 0.0
    goal = dense @ problem.hessian  # (out_features, in_features)
    start, removed = admm(dense, goal, target, problem, parameters.iterations)
    solved = conjugate_gradients(start, removed, goal, problem.hessian, parameters.cg_iterations)
    return solved / problem.scale, removed


def admm(dense: Tensor, goal: Tensor, target: Target, problem: Problem, iterations: int) -> tuple[Tensor, Tensor]:
    """Find a support (the paper's algorithm 1): weights on it and the mask of the others, both as `dense`.

    In turn, B = (goal - V + rho D) (H + rho I)^-1, D = what `target` keeps of B + V / rho, V = V + rho (B - D). rho grows
    with the part of the support that changed. If from the start hardly any does, rho was too large: a fifth is tried.
    """
    rho, moved, kept = FIRST_PENALTY, False, dense.numel() - target.count(dense.numel())
    first = before = removed = removal_mask(dense.abs(), target, "layer")
    solution, projected, dual = dense, without(dense, first), torch.zeros_like(dense)
    inverse = _inverse(problem, rho)
    for iteration in range(1, iterations + 1):
        solution = (goal - dual).add_(projected, alpha=rho) @ inverse
        proposed = solution.add(dual, alpha=1 / rho)
        removed = removal_mask(proposed.abs(), target, "layer")
        projected = without(proposed, removed)
        dual = (proposed - projected).mul_(rho)  # V + rho (B - D)
        if iteration % CHECK_EVERY:
            continue
        changed = int((removed != before).count_nonzero()) / max(kept, 1)
        if (changed == 0 and moved) or (changed < SETTLED and iteration >= EARLIEST):
            break
        moved = moved or changed > SOME
        if moved:
            rho *= 1.3 if changed > MANY else 1.2 if changed > SOME else 1.1
        else:
            rho, removed = rho / 5, first
            projected, dual = without(dense, first), torch.zeros_like(dense)
        before, inverse = removed, _inverse(problem, rho)
    return without(solution, removed), removed


def _inverse(problem: Problem, rho: float) -> Tensor:
    """(H + rho I)^-1, (in_features, in_features)."""
    return (problem.vectors / (problem.values + rho)) @ problem.vectors.T


def conjugate_gradients(start: Tensor, removed: Tensor, goal: Tensor, hessian: Tensor, iterations: int) -> Tensor:
    """Solve X H = `goal` on the support: the least squares weights where `removed` is not, (out_features, in_features).

    Rows are systems of their own. H has a unit diagonal, so its diagonal as a preconditioner is there already. Each step
    lowers the error of every row.
    """
    tiny = torch.finfo(start.dtype).tiny
    solution, residual = start.clone(), without(goal - start @ hessian, removed)
    direction, size = residual, residual.square().sum(dim=1, keepdim=True)  # size: (out_features, 1)
    enough = goal.square().sum(dim=1, keepdim=True) * CG_TOLERANCE**2
    for _ in range(iterations):
        if bool((size <= enough).all()):
            break
        image = without(direction @ hessian, removed)
        step = size / (direction * image).sum(dim=1, keepdim=True).clamp(min=tiny)  # (out_features, 1)
        solution.addcmul_(step, direction)
        residual = residual.addcmul(step, image, value=-1.0)
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        direction = residual.addcmul(size / before.clamp(min=tiny), direction)
    return solution


def squared_error(difference: Tensor, gram: Tensor) -> float:
    """tr(D G DT): the squared output error on the inputs of `gram`, (in_features, in_features), when the weight is off by
    `difference`, (out_features, in_features). In float64: what is left after pruning lies where G is small."""
    wide = difference.double()
    strips = range(0, len(gram), STRIP)
    return sum(float(((wide @ gram[:, at : at + STRIP].double()) * wide[:, at : at + STRIP]).sum()) for at in strips)


class ALPSMethod:
    """ALPS, or SparseGPT where its error on the same inputs is lower, which is told: `sparsegpt_was_better`."""

    def __init__(self, parameters: ALPS) -> None:
        self._parameters, self._block_size = parameters, SparseGPT(name="sparsegpt").block_size

    def prepare(self, statistics: Statistics | None) -> Problem:
        assert isinstance(statistics, Gram), "the registry says that ALPS observes the Gram"  # noqa: S101 - for the type checker
        return problem_of(inverse_factor(statistics.total, self._parameters.damping))

    def prune(self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: Problem) -> list[Pruned]:
        swept = sparsegpt(weights, targets, prepared.factor, self._block_size)
        others = [(each.weight, each.removed) for each in swept]
        triples = zip(weights, targets, others, strict=True)
        return [self._prune(weight, target, other, prepared) for weight, target, other in triples]

    def _prune(self, weight: Tensor, target: Target, other: tuple[Tensor, Tensor], problem: Problem) -> Pruned:
        gram, fallbacks = problem.factor.gram, problem.factor.fallbacks
        whole = squared_error(weight, gram)
        found = [alps(weight, target, problem, self._parameters), other]
        rounded = [(without(after.to(weight.dtype), removed), removed) for after, removed in found]
        ours, theirs = (squared_error(weight.float() - after.float(), gram) for after, _ in rounded)
        after, removed = rounded[0] if ours <= theirs else rounded[1]
        told = (*fallbacks, "sparsegpt_was_better") if theirs < ours else fallbacks
        return Pruned(after, removed, min(ours, theirs) / whole if whole > 0 else 0.0, "gram", told)
