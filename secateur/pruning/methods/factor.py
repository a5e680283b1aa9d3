"""The factor of an inverse Gram matrix, found whatever the Gram is like: what SparseGPT needs of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.problems import ProblemError

LEAF = 256  # rows that LAPACK factors; above, everything is a matrix product
MAX_DAMPING_RAISES = 4


@dataclass(frozen=True, slots=True)
class Factor:
    """What linears with the same input share.

    `upper`: U, upper triangular with H^-1 = UT U, float32, (in_features, in_features). `gram`: the undamped H, and `damping`
    what was added to its diagonal. `dead`: inputs that were always zero, (in_features,). `fallbacks`: see `Pruned`.
    """

    upper: Tensor
    gram: Tensor
    damping: float
    dead: Tensor
    fallbacks: tuple[str, ...]


def inverse_factor(gram: Tensor, damping: float) -> Factor:
    """Factor the inverse of H = `gram` + `damping` x mean(diagonal) x I; dead inputs get a one on the diagonal.

    `gram`: (in_features, in_features), any positive multiple of the sum of x xT; it is scaled in place, and kept. With J the
    reversal of the axes, J H J = L LT gives U = J L^-1 J: one factorisation and one triangular inverse. If float32 does not
    find H positive definite, float64 is tried, then more damping, tenfold each time; both are recorded. Raises ProblemError
    `nonfinite_activation` for a Gram that no damping of that range makes positive definite.
    """
    dead = gram.diagonal() == 0  # (in_features,)
    mean = gram.diagonal().double().mean().item() or 1.0
    scaled = gram.div_(mean)  # so that damping and dead inputs are of the diagonal's size, whatever the inputs' size
    fallbacks: list[str] = [f"dead_inputs:{int(dead.sum())}"] if bool(dead.any()) else []
    attempts = [(torch.float32, damping)] + [(torch.float64, damping * 10**k) for k in range(MAX_DAMPING_RAISES + 1)]
    for attempt, (dtype, amount) in enumerate(attempts):
        damped = scaled.flip(0, 1).to(dtype)  # a copy
        damped.diagonal().add_(amount + dead.flip(0).to(dtype))
        if inverted_factor(damped):
            if attempt:
                fallbacks.append(f"cholesky_float64:damping={amount:g}")
            return Factor(damped.float().flip(0, 1), scaled, amount, dead, tuple(fallbacks))
        del damped
    raise ProblemError(
        "nonfinite_activation",
        f"The Gram matrix of an input is not positive definite, not even with damping {attempts[-1][1]:g} in float64.",
        hint="The calibration activations are degenerate or too large: use more calibration text, or float32.",
    )


def inverted_factor(matrix: Tensor) -> bool:
    """Overwrite `matrix` = L LT, (n, n), with L^-1; False, and whatever was made so far, if it is not positive definite.

    By halves: with A = [[A1, .], [B, A2]] and X1 = L1^-1, L's lower left is C = B X1T, A2 - C CT = L2 L2T goes on the same
    way, and the inverse's lower left is -X2 C X1. Nearly all of it is matrix products, which LAPACK's factorisation and
    triangular inverse are not: at n = 1536 it is done in half their time.
    """
    n = len(matrix)
    if n <= LEAF:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed.item():
            return False
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return True
    half = n // 2
    first, second, lower_left = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    if not inverted_factor(first):
        return False
    corner = lower_left @ first.T  # (n - half, half)
    if not inverted_factor(second.addmm_(corner, corner.T, alpha=-1.0)):
        return False
    torch.mm(second, corner @ first, out=lower_left).neg_()
    matrix[:half, half:] = 0.0
    return True
