"""The running average of read-outs, and its learned correction."""

import torch
from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..heads import KEPT, NEVER, WRITES, Correction, DeltaRule, RunningAverage, followed_by
from ..heads.average import include
from ..registry import SIGNALS
from ..signals import read_observations
from ..state import TaskState
from .core import Core, full_precision, tokens_of
from .recent import RecentCore
from .signal import SignalCore
from .tokens import TokensCore


@SIGNALS.register("observations")
class AverageCore(SignalCore):
    """`accumulation="average"`: every chunk is read out from theta(0), and the state is the average read-out."""

    default_head = "gated"
    in_words = "No gradient is taken"

    @classmethod
    def make(cls, base: Base, config: IAIConfig) -> Core:
        if config.accumulation == "average":
            return super().make(base, config)
        return RecentCore(base, config) if config.accumulation == "recent" else TokensCore(base, config)

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        return config.accumulation == "average"

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config, reads=True)
        if config.correction:
            _, num_slots, num_layers, num_heads, width = self.state.pack(self.state.initial(1)).shape
            self.average = RunningAverage(num_layers, num_heads, num_slots, base.config.hidden_size)
            self.correction = self._make_correction(num_layers, num_heads, width)
            if config.delta_rule:
                self.delta = DeltaRule(num_layers, num_heads, width // 2)  # a packed slot is key and value

    def _make_correction(self, num_layers: int, num_heads: int, width: int) -> Correction:
        return Correction(num_layers, num_heads, width)

    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        tensors = self.state.initial(batch_size)
        first = next(iter(tensors.values()))  # (B, L, H, P, D), P = m without the slots of kept tokens
        return tensors | {"precision": first.new_zeros(first.shape[:-1])}

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:  # (B, C) each
        """The read-out of one chunk, in the layout of a state."""
        return self._read_out(base, tokens_of(ids, mask, labels)["ids"], mask)

    def _read_out(self, base: Base, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # (B, C), or (B, C, d), and (B, C)
        with base.lora(True):
            surprisal = self.config.num_kept_tokens > 0
            reading = read_observations(base, self.state, ids, mask, surprisal=surprisal)
        with full_precision(ids):
            evidence, mass = self.state.read_out(base, reading, self._rate(), writes=self.config.delta_rule)
            if self.config.correction:
                precision = self.average.precision(reading.hidden, mass)
            else:
                precision = torch.ones_like(next(iter(evidence.values()))[..., 0]) * (mass > 0)
        return evidence | {"precision": precision, "mask": mask}

    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        num_tokens = evidence["mask"].sum(1)  # (B,)
        readout = {name: evidence[name] for name in ("precision", *self.state.start)}
        with full_precision(num_tokens):
            if self.config.delta_rule:
                readout["value"] = readout["value"] - self._replaced(state, evidence)
            retention = (-self._rate() * num_tokens.view(-1, 1, 1, 1)).exp()
            tensors = include(state.tensors, readout, state.step, retention)
            if self.config.num_kept_tokens:
                tensors |= followed_by(*({n: t[n] for n in KEPT} for t in (state.tensors, evidence)), num_tokens)
        return tensors

    def _replaced(self, state: TaskState, evidence: dict[str, Tensor]) -> Tensor:  # (B, L, H, P, D)
        """The values that the chunk's tokens replace, for each slot; 0 before the first chunk."""
        replaced = self.delta(state.tensors["value"], *(evidence[name] for name in WRITES))
        return replaced * (state.step > 0).view(-1, 1, 1, 1, 1)

    def _rate(self) -> Tensor:  # (L, H, P), or what broadcasts to it
        """The forgetting rate per token. It is 0 without the correction."""
        return self.average.rate() if self.config.correction else self.state.read_slots.new_zeros(1, 1, 1)

    def corrected(self, base: Base, state: TaskState) -> dict[str, Tensor]:
        with full_precision(state.step):
            tensors = self.state.visible(base, state.tensors)
            if self.config.correction:
                packed = self.state.pack(tensors)
                weights, gradient = self._weights(state), self._gradient(state)
                corrected = self.correction(packed, weights, state.step, state.num_tokens, gradient)
                tensors = tensors | self.state.unpack(corrected)
        return tensors

    def _gradient(self, state: TaskState) -> Tensor | None:  # (B, m, L, H, W)
        """The gradients that the correction sees; None here."""
        return None

    def _weights(self, state: TaskState) -> Tensor:  # (B, L, H, m)
        """The weight of each slot: its weight in the average; for a kept token, how many tokens were read after it."""
        weights = state.step.view(-1, 1, 1, 1) * state.tensors["precision"]
        if self.config.num_kept_tokens:
            age = state.tensors["kept_age"][..., 0]  # (B, 1, 1, K)
            age = age.masked_fill(age == NEVER, 0).to(weights.dtype)
            weights = torch.cat([weights, age.expand(*weights.shape[:3], -1)], -1)
        return weights
