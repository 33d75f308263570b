"""Guards of states that gradients move: a bound on their size, and trust that is withdrawn where steps do harm."""

import torch
from torch import Tensor

from .classical import Tensors

MOST_GROWTH, SMALLEST = 10.0, 0.1
DECAY, LESS = 0.9, 0.8


def rms(tensor: Tensor) -> Tensor:  # (B, ...) -> (B, 1, ...)
    """Root mean square over each task's tensor."""
    return tensor.square().mean(tuple(range(1, tensor.dim())), keepdim=True).sqrt()


def most_rms(start: Tensor) -> Tensor:  # (1, ...) -> (1, 1, ...)
    return MOST_GROWTH * rms(start).clamp_min(SMALLEST)


@torch.no_grad()
def _shrinkage(tensor: Tensor, start: Tensor) -> Tensor:  # (B, ...), (...) -> (B, 1, ...)
    return (most_rms(start[None]) / rms(tensor)).clamp_max(1)


def bounded(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:  # (B, ...) and (...) each
    """theta min(1, 10 max(rms(theta(0)), 0.1) / rms(theta)): below ten times the start, exactly theta."""
    return {name: t * _shrinkage(t, start[name]) for name, t in tensors.items()}


def first_trust(like: Tensor) -> Tensors:  # (B, ...) -> (B,) each
    """What is kept before anything was read: full trust, and no slope measured."""
    zero = like.new_zeros(len(like))
    return {"slope": zero, "slope_square": zero.clone(), "trust": torch.ones_like(zero)}


@torch.no_grad()
def updated_trust(kept: Tensors, slope: Tensor, doubt: float) -> tuple[Tensors, Tensor]:  # (B,) each
    """How far to trust the steps after one more chunk, and what becomes of theta - theta(0).

        slope = <gradient, theta - theta(0)>        S = 0.9 S + slope        Q = 0.9 Q + slope^2

    The gradient is that of a chunk which theta has not read, so the slope says without bias whether the loss rises
    or falls on along the way from theta(0). Where S > doubt sqrt(Q) it rises: trust and the way are multiplied by 0.8.
    Where S < -doubt sqrt(Q), trust grows back, to 1 at most. A slope of exactly 0 says nothing.

    Args:
        kept: S, Q and the trust so far, as `first_trust` begins them.
        slope: of this chunk, in nats per token; all tensors together.
        doubt: how many standard errors of a sum of zero mean count as harm.

    Returns:
        What is kept, and 0.8 or 1 for the way.
    """
    total, square = DECAY * kept["slope"] + slope, DECAY * kept["slope_square"] + slope.square()
    certain = doubt * square.sqrt()
    trust = torch.where(total < -certain, kept["trust"] / LESS, kept["trust"]).clamp_max(1)
    less = torch.where(total > certain, LESS, 1.0).to(trust.dtype)
    after, measured = {"slope": total, "slope_square": square, "trust": trust * less}, slope != 0
    return {name: torch.where(measured, t, kept[name]) for name, t in after.items()}, less.where(measured, 1.0)


def trusted(theta: Tensor, after: Tensor, start: Tensor, less: Tensor, trust: Tensor) -> Tensor:
    """theta(0) + less (theta - theta(0)) + trust (after - theta): exactly `after` where both are 1.

    Args:
        theta, after: (B, ...), before and after the step.
        start: (B, ...) or what broadcasts to it.
        less, trust: (B,).
    """
    less, trust = (t.view(-1, *[1] * (theta.dim() - 1)) for t in (less, trust))
    guarded = start + less * (theta - start) + trust * (after - theta)
    return torch.where((less == 1) & (trust == 1), after, guarded)
