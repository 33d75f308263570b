"""A state of two parts: slots for what was just said, and fast weights for what a text is like."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..bases.base import KEYS_VALUES, Base
from ..bases.compat import window_of
from ..bases.prefixes import Prefix
from ..config import IAIConfig
from ..registry import STATES
from .lora import LoraState
from .token_slots import TokenSlots, check_token_slots

MOST_SLOTS = 256


@STATES.register("prefix+lora")
class PrefixLoraState(LoraState):
    """Slots that hold single tokens (`TokenSlots`), and fast weights: a low-rank update of the base's weights,

        W x + B A x

    Observations write the slots, and gradients write B. A is random, learned in training and shared by all tasks. So
    the update is linear in the state, and fast weights of several tasks can be averaged. State tensors are those of
    `TokenSlots`, and `{module}_B` (B, O, r).

    Args:
        base: the transformer, with its LoRA layers already added.
        num_slots: m.
        rank, target_modules: see `LoraState`.

    Source: two speeds of memory, Behrouz et al., Titans, arXiv 2501.00663; the form is ours.
    """

    fields = frozenset(
        "num_state_tokens state_r state_target_modules accumulation read_behind write_steps initial_rate".split()
    )
    fingerprint = fields
    defaults = LoraState.defaults | {
        "signal": "both",
        "accumulation": "attention",
        "head": "normalized",
        "state_target_modules": "all-linear",
    }
    needs = KEYS_VALUES
    exports = ("PREFIX_TUNING", "CARTRIDGE")
    writes = True

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        check_token_slots(config)
        if config.accumulation == "average":
            raise ValueError(
                "state_type='prefix+lora' keeps tokens, got accumulation='average': use 'attention', 'novelty', "
                "'surprisal' or 'recent'"
            )
        if config.state_r < 1:
            raise ValueError(f"state_r must be at least 1, got {config.state_r}")
        if config.write_steps < 1:
            raise ValueError(f"write_steps must be at least 1, got {config.write_steps}")

    @classmethod
    def complete_for_base(cls, config: IAIConfig, base_config) -> None:
        if config.num_state_tokens is None:
            config.num_state_tokens = min(MOST_SLOTS, window_of(base_config) // 4)
        super().complete_for_base(config, base_config)

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "PrefixLoraState":
        return cls(base, config.num_state_tokens, config.state_r, config.state_target_modules)

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        return f"{config.num_state_tokens} slots that hold tokens, and a lora of rank {config.state_r}"

    @classmethod
    def size(cls, config: IAIConfig) -> str:
        return f"{config.num_state_tokens}+{config.state_r}"

    def __init__(self, base: Base, num_slots: int, rank: int, target_modules: str | list[str]) -> None:
        super().__init__(base, rank, target_modules)
        self.down = nn.ParameterDict({name: self.start.pop(f"{name}_A") for name in self.paths})
        self.slots = TokenSlots(base, num_slots)
        self.num_slots_in_front = num_slots

    def update(self, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The update of each module: path -> A (1, r, I), B (B, O, r)."""
        return {path: (self.down[name][None], tensors[f"{name}_B"]) for name, path in self.paths.items()}

    def initial(self, batch_size: int) -> dict[str, Tensor]:
        return super().initial(batch_size) | self.slots.initial(batch_size)

    def visible(self, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().visible(base, tensors) | self.slots.visible(base, tensors)

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[Prefix]:
        with super().under(base, tensors), self.slots.under(base, tensors) as prefix:
            yield prefix
