"""Prototypes: a fixed number of weighted points for each class that stand for all of its examples.

Axes: N classes of all tasks, B tasks, C classes of a task, n examples of a chunk, P prototypes, d features.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

LEAST = 1e-9  # masses are clamped to this before something is divided by them


@torch.no_grad()
def absorb(points: Tensor, mass: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Add the examples of a chunk, in their order, each to the prototypes of its class.

    An example takes a free place. If there is none, the two points u, v of the class, the example among them, are
    replaced by their mean whose replacement costs least (two equal points cost nothing, and may become one before):

        cost = m_u m_v / (m_u + m_v) |u - v|^2

    which is what it adds to the sum of squares within prototypes. So a class of at most P examples is kept whole.

    Args:
        points: (B, C, P, d); they are not changed.
        mass: (B, C, P), how many examples each point stands for, 0 for a free place; is not changed.
        x: (B, n, d).
        labels: class of each example, -100 for padding, (B, n).

    Returns:
        The new points and masses.

    Example:
        >>> points, mass = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2)
        >>> x, labels = torch.tensor([[[1.0], [5.0], [2.0]]]), torch.zeros(1, 3, dtype=torch.long)
        >>> points, mass = absorb(points, mass, x, labels)
        >>> points.flatten().tolist(), mass.flatten().tolist()
        ([1.5, 5.0], [2.0, 1.0])

    Source: Ward, Hierarchical Grouping to Optimize an Objective Function (1963), applied to a stream.
    """
    points, mass = points.clone(), mass.clone()
    said = one_hot(labels.clamp_min(0), mass.shape[1]) * (labels >= 0).unsqueeze(-1)  # (B, n, C)
    turn = said.cumsum(1).mul_(said).sum(-1)  # the k-th example of its class in this chunk; classes do not meet
    for k in range(1, int(turn.max()) + 1 if turn.numel() else 1):
        task, example = (turn == k).nonzero(as_tuple=True)  # at most one example of each class
        own = task, labels[task, example]
        points[own], mass[own] = _with_one_more(points[own], mass[own], x[task, example], mass.new_ones(len(task)))
    return points, mass


@torch.no_grad()
def unite(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The prototypes of two states, as many as one of them has: points (B, C, P, d) and masses (B, C, P) of both."""
    points, mass = (t.flatten(0, 1) for t in one)  # (N, P, d), (N, P)
    for x, weight in zip(other[0].flatten(0, 1).unbind(1), other[1].flatten(0, 1).unbind(1), strict=True):
        points, mass = _with_one_more(points, mass, x, weight)
    return points.view_as(one[0]), mass.view_as(one[1])


def _with_one_more(points: Tensor, mass: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Points (N, P, d) and masses (N, P) of N classes, and one more point for each: the cheapest two become one.

    Two places cost nothing if one of them is free.
    """
    before, is_new = (points, mass), weight.unsqueeze(1) > 0
    points, mass = torch.cat([points, x.unsqueeze(1)], 1), torch.cat([mass, weight.unsqueeze(1)], 1)
    rows, (first, second) = torch.arange(len(x), device=x.device), torch.triu_indices(mass.shape[1], mass.shape[1], 1)
    both = mass[:, first] * mass[:, second] / (mass[:, first] + mass[:, second]).clamp_min(LEAST)
    size = points.square().sum(-1)  # (N, P + 1)
    apart = size[:, first] + size[:, second] - 2 * (points @ points.mT)[:, first, second]
    pair = (apart.clamp_min(0) * both).argmin(1)
    into, gone = first.to(pair.device)[pair], second.to(pair.device)[pair]
    total = mass[rows, into] + mass[rows, gone]
    share = (mass[rows, gone] / total.clamp_min(LEAST)).unsqueeze(1)
    points[rows, into] = points[rows, into].lerp(points[rows, gone], share)
    mass[rows, into] = total
    points[rows, gone], mass[rows, gone] = points[:, -1].clone(), mass[:, -1].clone()  # the new one moves in
    points = torch.where(is_new.unsqueeze(-1), points[:, :-1], before[0])
    return points, torch.where(is_new, mass[:, :-1], before[1])
