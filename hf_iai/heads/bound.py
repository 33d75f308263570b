"""The guard that keeps a state which gradients move from running away."""

import torch
from torch import Tensor

MOST_GROWTH, SMALLEST = 10.0, 0.1


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
