"""Scores that follow a scale without a new forward (the paper's equations 9 to 11).

With D = diag(s) and X' = D X, the diagonal of X' X'T is s^2 times that of X XT: the score |W| sqrt(diag) is multiplied by s.
What is cached is the logarithm of a method's own score; theta = log s is added to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.pruning.methods.magnitude import magnitude_scores
from secateur.pruning.methods.ria import ria_scores
from secateur.pruning.methods.statistical_correction import column_factors
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.statistics import InputMoments
from secateur.recipes import RIA, Magnitude, Method, StatisticalCorrection

_LEAST = torch.finfo(torch.float32).tiny  # whose logarithm is finite: a weight of zero has a score of zero


def log_scores(method: Method, weight: Tensor, moments: InputMoments) -> Tensor:
    """The logarithm of what `method` compares a linear's weights by, (out_features, in_features), float32.

    `moments`: of the inputs. SparseGPT's saliency changes while it runs: in its place stands the score on the diagonal.
    """
    norms = moments.squares.sqrt()
    match method:
        case Magnitude():
            scores = magnitude_scores(weight)
        case RIA():
            scores = ria_scores(weight, norms, method.power)
        case StatisticalCorrection():
            assert method.alpha != "auto", "a recipe with induction has a number"  # noqa: S101 - for the type checker
            statistic = norms if method.variant == "secateur" else moments.variance.pow(0.25)
            scores = wanda_scores(weight, statistic) * column_factors(weight, method.alpha, method.epsilon)
        case _:
            scores = wanda_scores(weight, norms)
    return scores.clamp_min(_LEAST).log_()
