"""A low-rank update of the base's weights, one per task."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..bases.base import Base, Prefix
from ..bases.low_rank import linear_modules, low_rank_updates
from .slots import SlotState


class LoraState(SlotState):
    """State tensors `{module}_A` (B, r, I) and `{module}_B` (B, O, r) for each module `W x` of the base, in float32:

        W x + B A x

    `{module}` is the module's path with `_` for each dot. theta(0) starts as LoRA does, A random and B zero, so that it
    has no effect; both are learned.

    Args:
        base: the transformer, after LoRA was put in.
        rank: r.
        target_modules: see `low_rank.linear_modules`.
    """

    def __init__(self, base: Base, rank: int, target_modules: str | list[str]) -> None:
        super().__init__()
        shapes = linear_modules(base.model, target_modules, base.uncalled)
        self.paths = {path.replace(".", "_"): path for path in shapes}
        self.start = nn.ParameterDict()
        for name, path in self.paths.items():
            width_in, width_out = shapes[path]
            down = nn.init.kaiming_uniform_(torch.empty(rank, width_in), a=5**0.5)
            self.start |= {f"{name}_A": nn.Parameter(down), f"{name}_B": nn.Parameter(torch.zeros(width_out, rank))}

    def kind(self, name: str) -> str:
        """What tensors of the same kind have in common: `"A"` or `"B"`."""
        return name[-1]

    def update(self, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """path -> A, B."""
        return {path: (tensors[f"{name}_A"], tensors[f"{name}_B"]) for name, path in self.paths.items()}

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[Prefix]:
        updates = {base.model.get_submodule(path): pair for path, pair in self.update(tensors).items()}
        with low_rank_updates(updates):
            yield base.no_prefix(len(next(iter(tensors.values()))))
