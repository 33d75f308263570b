"""Slots that hold single tokens: what was just said, and what was attended to."""

from dataclasses import replace

import torch
from torch import Tensor

from ..bases.base import Base
from ..bases.places import ages_of, in_order, positions_of
from ..bases.prefixes import KeysValues
from ..config import IAIConfig
from ..heads.chosen import CHOSEN, by_attention, with_later
from ..heads.kept import NEVER, trace
from ..signals.one_pass import OnePass, read_in_one_pass
from ..state import KEPT_BY, TaskState
from .core import Evidence, StateCore, full_precision


class TokensCore(StateCore):
    """`accumulation="attention"`, `"novelty"` or `"surprisal"`: the slots hold tokens as the base read them.

    Every chunk is read behind the slots, so what is kept of it knows what came before (`read_behind="state"`), or
    behind nothing (`read_behind="start"`).
    """

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config, reads=False)

    @property
    def read_apart(self) -> bool:
        """Whether chunks are read behind nothing, so that states can be merged."""
        return self.config.read_behind == "start"

    @property
    def rule(self) -> str:
        """The rule by which tokens are chosen. If later chunks do not see a token, only its own chunk attends to it."""
        by_own_chunk = self.read_apart and self.config.accumulation == "attention"
        return "worth" if by_own_chunk else self.config.accumulation

    @property
    def accumulation(self) -> str:
        return KEPT_BY + self.rule if self.read_apart else "memory"

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:  # (B, C) each
        # What is recorded of attention must be in the order in which the base reads the tokens.
        if (order := base.packing(mask, self.state.num_slots_in_front)) is not None:
            ids, mask, labels = (in_order(t, order) for t in (ids, mask, labels))
        return super().read(base, ids, mask, labels)

    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        return self.state.initial(batch_size)

    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._kept(state, self._read(base, state, {}, evidence), evidence["mask"])

    def _read(self, base: Base, state: TaskState, theta: dict[str, Tensor], evidence: dict[str, Tensor]) -> OnePass:
        """Read the chunk in one pass; `theta` are the tensors to differentiate with respect to."""
        slots = self.state.initial(state.batch_size) if self.read_apart else state.tensors
        seen = self.state.visible(base, slots | theta)
        chunk = tuple(evidence[name] for name in ("ids", "mask", "labels"))
        with base.lora(self.config.lora_answers):
            return read_in_one_pass(
                base,
                lambda theta: self.state.under(base, seen | theta),
                theta,
                chunk,
                attention=self.config.accumulation in ("attention", "novelty"),
                learned=lambda: (*self.parameters(), *base.model.parameters()),
            )

    def _kept(self, state: TaskState, reading: OnePass, mask: Tensor) -> dict[str, Tensor]:  # (B, C)
        """The tokens to keep of those before and those of the chunk."""
        with full_precision(mask):
            before = {name: state.tensors[name] for name in CHOSEN}
            num_slots, shape = before["key"].shape[-2], before["worth"].shape[:3]
            worth = self._worth(reading, num_slots).expand(*shape, -1).unsqueeze(-1)  # (B, L, H, m + C, 1)
            if not self.read_apart:
                before["worth"] = before["worth"] + worth[..., :num_slots, :]
            padding = mask[:, None, None, :, None] == 0
            age = ages_of(mask)[:, None, None, :, None].masked_fill(padding, NEVER).expand(*shape, -1, -1)
            worth = worth[..., num_slots:, :].masked_fill(padding, 0)
            chunk = {"key": reading.key, "value": reading.value, "worth": worth, "age": age}
            if self.rule == "worth":
                chunk["worth"] = by_attention(chunk["worth"], age)
            kept = with_later(before, chunk, mask.sum(1), self.rule)
        return kept | {"loss": reading.loss}

    def of_cache(
        self, base: Base, state: TaskState, layers: KeysValues, mask: Tensor, received: Tensor | None
    ) -> TaskState:
        """The state of a text whose keys and values are at hand.

        Args:
            base: the pretrained model.
            state: the state before, which has read nothing.
            layers: keys and values of the text, (B, H, T, D) for each layer.
            mask: 1 for real tokens, (B, T).
            received: the attention that each token received, (B, L, H, T). None: it is not known.

        Raises:
            ValueError: if some tokens must be left out, and it is not known which.
        """
        keys, values = (torch.stack(t, 1).float() for t in zip(*layers, strict=True))
        num_slots, rule = state.tensors["key"].shape[-2], self.config.accumulation
        if received is None and rule != "recent" and keys.shape[-2] > num_slots:
            raise ValueError(
                f"{keys.shape[-2]} tokens do not fit {num_slots} slots, and accumulation={rule!r} cannot choose from a "
                "cache alone: pass attentions= of a pass with output_attentions=True, or use accumulation='recent'"
            )
        shape = state.tensors["worth"].shape
        received = keys.new_zeros(1) if received is None else torch.nn.functional.pad(received, (num_slots, 0))
        received = received.expand(*shape[:3], num_slots + mask.shape[1])
        keys = base.rotate(keys, -positions_of(mask))
        reading = OnePass(keys, values, received, state.tensors["loss"], surprisal=None, gradient={})
        tensors = state.tensors | self._kept(state, reading, mask)
        return replace(state, tensors=tensors, step=state.step + 1, num_tokens=mask.sum(1))

    def _worth(self, reading: OnePass, num_slots: int) -> Tensor:  # (B, L or 1, H or 1, m + C)
        """What the chunk adds to the worth of the slots' tokens, and the worth of its own."""
        if reading.received is not None:
            return reading.received
        of_chunk = trace(reading.surprisal)[:, None, None] * (self.config.accumulation == "surprisal")
        return torch.nn.functional.pad(of_chunk, (num_slots, 0))
