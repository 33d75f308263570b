"""Regularised logistic regression over weighted points, by conjugate gradients.

Axes: B tasks, N points, C classes, d features.
"""

import torch
from torch import Tensor

CURVATURE = 0.05  # mean of p (1 - p), by which the points' second moment approximates the curvature of the loss
NEWTON_STEPS, SHORTENINGS = 2, 20  # of a line search
ROUNDING = 1e-6  # of sums in float32, relative to the trace of M


def fit(
    rows: Tensor,  # V (B, C, d)
    points: Tensor,  # (B, N, d)
    said: Tensor,  # y (B, N, C)
    mass: Tensor,  # u (B, N, 1)
    prior: Tensor,  # logits before V (B, N, C)
    moment: Tensor,  # M (B, d, d)
    penalty: Tensor,  # lambda (B,)
    num_steps: int,
) -> Tensor:
    """Go on with a fit of V by conjugate gradients, from the given V.

    The loss, with p = softmax(prior + V z) at a point z, is

        J(V) = sum_j u_j (-log p_j[y_j]) + lambda / 2 |V|^2

    The preconditioner is (0.05 M + lambda I)^-1, with at least 1e-6 tr(M) for lambda, since M is a sum in float32. The
    step along a direction is found by Newton's method, and shortened until J does not rise. At the minimum V depends on
    the prior and lambda alone. Gradients run through the directions of these steps, not through the given V and not
    through the lengths of the steps: close to the minimum these are the gradients of the minimum.

    Args:
        rows: the start.
        points, said, mass: the points, their classes (one-hot) and weights.
        prior: logits to which V z is added.
        moment: sum of z z', for the preconditioner.
        penalty: above 0.

    Returns:
        V (B, C, d).

    Source: Polak and Ribiere (1969); Boehning, Multinomial Logistic Regression Algorithm (1992), for a curvature that
    all classes share; Bolte, Pauwels and Vaiter, arXiv 2305.13768, for gradients through the last steps.
    """
    rows, penalty = rows.detach(), penalty.view(-1, 1, 1)
    eye = torch.eye(moment.shape[-1], device=moment.device)
    ridge = penalty.maximum(ROUNDING * moment.diagonal(dim1=1, dim2=2).sum(-1).view(-1, 1, 1))
    factor = torch.linalg.cholesky((CURVATURE * moment + ridge * eye).detach())
    logits, direction, last = prior + points @ rows.mT, None, None
    for _ in range(num_steps):
        gradient = ((logits.softmax(-1) - said) * mass).mT @ points + penalty * rows
        step = -torch.cholesky_solve(gradient.mT, factor).mT
        direction = step if last is None else step + _kept(gradient, step, *last) * direction
        last = gradient.detach(), step.detach()
        moved = points @ direction.mT
        length = _length(logits, moved, rows, direction, said, mass, penalty)
        rows, logits = rows + length * direction, logits + length * moved
    return rows


@torch.no_grad()
def _kept(gradient: Tensor, step: Tensor, last_gradient: Tensor, last_step: Tensor) -> Tensor:  # (B, 1, 1)
    """The share of the last direction that is kept (Polak and Ribiere); 0 where it would be below 0."""
    grown, before = _dot(gradient - last_gradient, step), _dot(last_gradient, last_step)
    return torch.where(before < 0, grown / before, 0.0).clamp_min(0)


@torch.no_grad()
def _length(
    logits: Tensor, moved: Tensor, rows: Tensor, direction: Tensor, said: Tensor, mass: Tensor, penalty: Tensor
) -> Tensor:  # (B, 1, 1)
    """How far to go: Newton's method on the loss along the direction. Never backwards, and never up."""
    length, square, slant = torch.zeros_like(penalty), _dot(direction, direction), _dot(rows, direction)

    def loss(length: Tensor) -> Tensor:  # (B, 1, 1), up to a constant
        at = logits + length * moved
        nats = ((at.logsumexp(-1, keepdim=True) - (at * said).sum(-1, keepdim=True)) * mass).sum((1, 2), keepdim=True)
        return nats + penalty * length * (slant + length * square / 2)

    for _ in range(NEWTON_STEPS):
        p = (logits + length * moved).softmax(-1)
        mean = (p * moved).sum(-1, keepdim=True)
        slope = ((mean - (said * moved).sum(-1, keepdim=True)) * mass).sum((1, 2), keepdim=True)
        bend = (((p * moved.square()).sum(-1, keepdim=True) - mean.square()) * mass).sum((1, 2), keepdim=True)
        slope, bend = slope + penalty * (slant + length * square), bend + penalty * square
        moved_to = torch.where(bend > 0, length - slope / bend, length)
        length = torch.where(moved_to > 0, moved_to, length / 2)  # the step before may have gone much too far
    # Where p is close to 0 or 1 the loss is nearly straight, and Newton's steps go much too far.
    most = loss(torch.zeros_like(length)) * (1 + ROUNDING)
    for _ in range(SHORTENINGS):
        if not (rises := loss(length) > most).any():
            return length
        length = torch.where(rises, length / 4, length)
    return torch.where(rises, 0.0, length)


def _dot(one: Tensor, other: Tensor) -> Tensor:  # (B, C, d) each -> (B, 1, 1)
    return (one * other).sum((1, 2), keepdim=True)
