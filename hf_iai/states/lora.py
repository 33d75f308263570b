"""A low-rank update of the base's weights, a separate one for each task."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..bases.base import Base
from ..bases.compat import default_target_modules
from ..bases.low_rank import linear_modules, low_rank_updates
from ..bases.prefixes import Prefix
from ..config import IAIConfig
from ..registry import STATES
from .hypernetwork import HypernetworkState
from .slots import SlotState, check_slots, first_slots


@STATES.register("lora")
class LoraState(SlotState):
    """Float32 state tensors `{module}_A` (B, r, I) and `{module}_B` (B, O, r) for each linear module `W x` of the base:

        W x + B A x

    `{module}` is the path of the module, with `_` for each dot. theta(0) starts as LoRA does, with a random A and B =
    0, so that it has no effect. Both are learned. This class is for gradients; `HypernetworkState` takes its place if
    the base reads chunks out.

    Args:
        base: the transformer, with its LoRA layers already added.
        rank: r.
        target_modules: see `low_rank.linear_modules`.
    """

    fields = fingerprint = frozenset({"num_state_tokens", "state_r", "state_target_modules"})
    initial_rate = 1.0
    exports = ("LORA",)
    updates_weights = True

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        check_slots(config)
        if config.state_r < 1:
            raise ValueError(f"state_r must be at least 1, got {config.state_r}")
        if config.accumulation != "average":
            raise ValueError(
                f"accumulation={config.accumulation!r} keeps tokens, which state_type='lora' cannot: use 'average'"
            )

    @classmethod
    def complete_for_base(cls, config: IAIConfig, base_config) -> None:
        # The modules are saved by name, since another version of PEFT may choose others.
        targets = config.state_target_modules or default_target_modules(base_config)
        config.state_target_modules = targets if isinstance(targets, str) else sorted(targets)

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> SlotState:
        if reads:
            return HypernetworkState.make(base, config, reads=reads)
        first_slots(base, config)  # drawn though unused, so that a seed gives the same weights as before
        return cls(base, config.state_r, config.state_target_modules)

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        return f"lora of rank {config.state_r}"

    @classmethod
    def size(cls, config: IAIConfig) -> int:
        return config.state_r

    def __init__(self, base: Base, rank: int, target_modules: str | list[str]) -> None:
        super().__init__()
        shapes = linear_modules(base.model, target_modules, base.uncalled)
        self.paths = {path.replace(".", "_"): path for path in shapes}
        self.start = nn.ParameterDict()
        for name, path in self.paths.items():
            width_in, width_out = shapes[path]
            down = nn.init.kaiming_uniform_(torch.empty(rank, width_in), a=5**0.5)
            self.start |= {f"{name}_A": nn.Parameter(down), f"{name}_B": nn.Parameter(torch.zeros(width_out, rank))}

    def tensor_kind(self, name: str) -> str:
        """The group of a tensor: `"A"` or `"B"`."""
        return name[-1]

    def update(self, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The update of each module: path -> A (B, r, I), B (B, O, r)."""
        return {path: (tensors[f"{name}_A"], tensors[f"{name}_B"]) for name, path in self.paths.items()}

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[Prefix]:
        updates = {base.model.get_submodule(path): pair for path, pair in self.update(tensors).items()}
        with low_rank_updates(updates):
            yield base.no_prefix(len(next(iter(tensors.values()))))
