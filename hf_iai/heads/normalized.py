"""Gradient steps of a size that does not depend on the size of the gradient, so that one rate serves all bases."""

import torch
from torch import Tensor, nn

from ..registry import HEADS
from ..tensors import along
from .classical import SGD, Tensors
from .guards import first_trust, trusted, updated_trust

DECAY_POWER = 0.8  # the decay of the averages after t steps is 1 - t^-0.8, so the first step is not biased
DOUBT = 1.5  # standard errors from which a rising loss counts as certain
TINY = 1e-30


@HEADS.register("normalized")
class NormalizedStep(SGD):
    """theta' = theta - rate u, with u the gradient over the root of its factored second moment, at most 1 on average:

        row, column = running means of gradient^2 over the last axis, and over the last but one
        u           = gradient / sqrt(row column / mean(row)),      u / max(1, rms(u))

    A coordinate moves by about `rate` at every step, whatever the base's size. Apart from theta the state stores a
    row and a column of each matrix, not a number for each coordinate. A guard (`heads.guards`) partly undoes steps that
    raise the loss of newly read text, and makes the steps after them smaller: `slope`, `slope_square`, `trust` (B,).

    Source: Shazeer and Stern, Adafactor, arXiv 1804.04235, algorithm 4, without momentum and relative step size.
    """

    @classmethod
    def first_rate(cls, state: nn.Module) -> float:
        return 6e-3

    def initial(self, theta: Tensors) -> Tensors:
        kept = first_trust(next(iter(theta.values())))
        for name, t in theta.items():
            kept |= {
                f"row_{name}": t.new_zeros(t.shape[:-1]),
                f"column_{name}": t.new_zeros(*t.shape[:-2], t.shape[-1]),
            }
        return kept

    def forward(
        self, theta: Tensors, kept: Tensors, gradient: Tensors, step: Tensor, start: Tensors
    ) -> tuple[Tensors, Tensors]:
        slope = sum((g * (theta[name] - start[name])).detach().flatten(1).sum(1) for name, g in gradient.items())
        trust, less = updated_trust(kept, slope, DOUBT)
        share = (step + 1).float() ** -DECAY_POWER  # (B,)
        after, kept_after = {}, dict(trust)
        for name, g in gradient.items():
            square = g.detach().square()
            means = {f"row_{name}": square.mean(-1), f"column_{name}": square.mean(-2)}
            means = {n: torch.lerp(kept[n], now, along(share, now).expand_as(now)) for n, now in means.items()}
            u = _direction(g, *means.values())
            moved = theta[name] - self.rate(name) * u
            after[name] = trusted(theta[name], moved, start[name], less, trust["trust"])
            kept_after |= means
        return after, kept_after


def _direction(gradient: Tensor, row: Tensor, column: Tensor) -> Tensor:  # (B, ..., O, I), (B, ..., O), (B, ..., I)
    second = row.unsqueeze(-1) * column.unsqueeze(-2) / (row.mean(-1)[..., None, None] + TINY)
    u = gradient * (second + TINY).rsqrt()
    return u / u.square().mean((-1, -2), keepdim=True).sqrt().clamp_min(1)
