"""Guards for gradient steps: a bound on the size of the state, and smaller steps once steps have done harm."""

import torch
from torch import Tensor

from ..tensors import along
from .classical import Tensors

MOST_GROWTH, SMALLEST = 10.0, 0.1  # a tensor may grow to ten times its start, and a start below 0.1 counts as 0.1
DECAY, LESS = 0.9, 0.8  # decay of the slope's sums; factor on the trust and on the way from theta(0)


def rms(tensor: Tensor) -> Tensor:  # (B, ...) -> (B, 1, ...)
    """Root mean square of each task's tensor."""
    return tensor.square().mean(tuple(range(1, tensor.dim())), keepdim=True).sqrt()


def most_rms(start: Tensor) -> Tensor:  # (1, ...) -> (1, 1, ...)
    """The largest root mean square that a tensor with this theta(0) may have."""
    return MOST_GROWTH * rms(start).clamp_min(SMALLEST)


@torch.no_grad()
def _shrinkage(tensor: Tensor, start: Tensor) -> Tensor:  # (B, ...), (...) -> (B, 1, ...)
    return (most_rms(start[None]) / rms(tensor)).clamp_max(1)


def bounded(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:  # (B, ...) and (...) each
    """Scale down tensors that have grown too large: theta min(1, 10 max(rms(theta(0)), 0.1) / rms(theta)).

    Smaller tensors are returned bitwise unchanged.

    Args:
        tensors: theta, name -> (B, ...).
        start: theta(0), name -> (...).
    """
    return {name: t * _shrinkage(t, start[name]) for name, t in tensors.items()}


def first_trust(like: Tensor) -> Tensors:  # (B, ...) -> (B,) each
    """What `updated_trust` starts from: full trust, and no slope measured."""
    zero = like.new_zeros(len(like))
    return {"slope": zero, "slope_square": zero.clone(), "trust": torch.ones_like(zero)}


@torch.no_grad()
def updated_trust(kept: Tensors, slope: Tensor, doubt: float) -> tuple[Tensors, Tensor]:  # (B,) each
    """Test on one more chunk whether the steps so far lower the loss, and update how far to trust the next ones.

        slope = <gradient, theta - theta(0)>        S = 0.9 S + slope        Q = 0.9 Q + slope^2

    theta has not read the chunk yet, so the slope is an unbiased measure of whether the loss still falls in the
    direction from theta(0) to theta. If S > doubt sqrt(Q), the loss rises: trust and theta - theta(0) are multiplied
    by 0.8. If S < -doubt sqrt(Q), trust grows back, up to 1. A slope of exactly 0 changes nothing.

    Args:
        kept: S, Q and the trust so far; `first_trust` gives the first.
        slope: slope on this chunk, in nats per token, summed over all tensors.
        doubt: number of standard errors, of a sum with mean zero, from which a rise counts as certain.

    Returns:
        The new S, Q and trust, and the factor on theta - theta(0): 0.8 or 1.
    """
    total, square = DECAY * kept["slope"] + slope, DECAY * kept["slope_square"] + slope.square()
    certain = doubt * square.sqrt()
    trust = torch.where(total < -certain, kept["trust"] / LESS, kept["trust"]).clamp_max(1)
    less = torch.where(total > certain, LESS, 1.0).to(trust.dtype)
    after, measured = {"slope": total, "slope_square": square, "trust": trust * less}, slope != 0
    return {name: torch.where(measured, t, kept[name]) for name, t in after.items()}, less.where(measured, 1.0)


def trusted(theta: Tensor, after: Tensor, start: Tensor, less: Tensor, trust: Tensor) -> Tensor:
    """Take a step only as far as it is trusted: theta(0) + less (theta - theta(0)) + trust (after - theta).

    If both factors are 1, the result is bitwise `after`.

    Args:
        theta: before the step, (B, ...).
        after: after the step, (B, ...).
        start: theta(0), (B, ...) or a shape that broadcasts to it.
        less: factor on theta - theta(0), (B,).
        trust: factor on the step, (B,).
    """
    less, trust = (along(t, theta) for t in (less, trust))
    guarded = start + less * (theta - start) + trust * (after - theta)
    return torch.where((less == 1) & (trust == 1), after, guarded)
