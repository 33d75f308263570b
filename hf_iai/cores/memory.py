"""Memory with two speeds: slots for what was just said, and fast weights that each chunk's gradient moves."""

from dataclasses import replace

import torch
from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..heads import bounded
from ..registry import HEADS
from ..signals.one_pass import record_loss
from ..state import TaskState
from ..tensors import along
from .core import full_precision
from .tokens import TokensCore


class MemoryCore(TokensCore):
    """A state of slots and fast weights. A chunk is read in one pass behind the slots, under the fast weights:

        slots(i+1)        = the tokens to keep of slots(i) and chunk(i)
        fast weights(i+1) = head(fast weights(i), d loss(chunk(i) | state(i)) / d fast weights(i))

    A state that has read nothing has no slots and no update, so the base answers as it is. The first chunk moves the
    fast weights from where training lets them start. With `write_steps` above 1 the chunk is read again for each
    further step, behind the same slots.
    """

    uses_labels = True

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config)
        if config.initial_rate is None:  # the rate is saved with the adapter, since learned rates are relative to it
            config.initial_rate = HEADS[config.head].first_rate(self.state)
        self.head = HEADS[config.head].make(self.state, config)

    @property
    def scores_reading(self) -> bool:
        return not self.read_apart

    def usual_chunk_size(self, longest: int) -> int:
        """As many tokens as there are slots: every chunk is a step of the fast weights, so short ones are better."""
        return min(longest, self.state.num_slots_in_front)

    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        tensors = super()._initial(base, batch_size)
        start = self._theta(tensors)
        return tensors | {name: torch.zeros_like(t) for name, t in start.items()} | self.head.initial(start)

    def of_cache(self, base: Base, state: TaskState, *text) -> TaskState:
        """The state of a text that is in a cache: its slots, and the fast weights where they start."""
        found, batch = super().of_cache(base, state, *text), state.batch_size
        start = {name: t.detach().expand(batch, *t.shape).clone() for name, t in self.state.start.items()}
        return replace(found, tensors=found.tensors | start)

    def _theta(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fast weights."""
        return {name: tensors[name] for name in self.state.start}

    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        start, theta = dict(self.state.start.items()), self._theta(state.tensors)
        kept = {name: state.tensors[name] for name in self.head.initial(theta)}
        slots = None
        for number in range(self.config.write_steps):
            reading = self._read(base, state, theta, evidence)
            if slots is None:
                slots = self._kept(state, reading, evidence["mask"])
                record_loss(reading)
            count = state.step * self.config.write_steps + number
            theta = {name: torch.where(along(count == 0, t), start[name], t) for name, t in theta.items()}
            with full_precision(state.step):
                theta, kept = self.head(theta, kept, reading.gradient, count, start)
                theta = bounded(theta, start)
        return slots | theta | kept
