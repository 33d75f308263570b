"""Slots that hold single tokens: what was just said, and what was attended to."""

import torch
from torch import Tensor

from ..bases.base import Base, ages_of
from ..config import IAIConfig
from ..heads.chosen import CHOSEN, with_later
from ..heads.kept import NEVER, trace
from ..signals.one_pass import OnePass, read_in_one_pass
from ..state import KEPT_BY, TaskState
from .core import StateCore, full_precision


class TokensCore(StateCore):
    """`accumulation="attention"` or `"surprisal"` of a prefix: the slots hold tokens as the base read them.

    Every chunk is read behind the slots, so what is kept of it knows what came before (`read_behind="state"`), or
    behind nothing (`read_behind="start"`).
    """

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config, reads=False)

    @property
    def accumulation(self) -> str:
        return KEPT_BY + self.config.accumulation if self.config.read_behind == "start" else "memory"

    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        return self.state.initial(batch_size)

    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._kept(state, self._read(base, state, {}, evidence), evidence["mask"])

    def _read(self, base: Base, state: TaskState, theta: dict[str, Tensor], evidence: dict[str, Tensor]) -> OnePass:
        """Read the chunk in one pass; `theta` are the tensors to differentiate with respect to."""
        slots = state.tensors if self.config.read_behind == "state" else self.state.initial(state.batch_size)
        seen = self.state.visible(base, slots | theta)
        chunk = tuple(evidence[name] for name in ("ids", "mask", "labels"))
        with base.lora(self.config.lora_answers):
            return read_in_one_pass(
                base,
                lambda theta: self.state.under(base, seen | theta),
                theta,
                chunk,
                attention=self.config.accumulation == "attention",
            )

    def _kept(self, state: TaskState, reading: OnePass, mask: Tensor) -> dict[str, Tensor]:  # (B, C)
        """The tokens to keep of those before and those of the chunk."""
        with full_precision(mask):
            before = {name: state.tensors[name] for name in CHOSEN}
            num_slots, shape = before["key"].shape[-2], before["worth"].shape[:3]
            worth = self._worth(reading, num_slots).expand(*shape, -1).unsqueeze(-1)  # (B, L, H, m + C, 1)
            if self.config.read_behind == "state":
                before["worth"] = before["worth"] + worth[..., :num_slots, :]
            padding = mask[:, None, None, :, None] == 0
            age = ages_of(mask)[:, None, None, :, None].masked_fill(padding, NEVER).expand(*shape, -1, -1)
            worth = worth[..., num_slots:, :].masked_fill(padding, 0)
            chunk = {"key": reading.key, "value": reading.value, "worth": worth, "age": age}
            return with_later(before, chunk, mask.sum(1), self.config.accumulation)

    def _worth(self, reading: OnePass, num_slots: int) -> Tensor:  # (B, L or 1, H or 1, m + C)
        """What the chunk adds to the worth of the slots' tokens, and the worth of its own."""
        if reading.received is not None:
            return reading.received
        of_chunk = trace(reading.surprisal)[:, None, None] * (self.config.accumulation == "surprisal")
        return torch.nn.functional.pad(of_chunk, (num_slots, 0))
