"""Observations and gradients together: an average of read-outs, with a correction that sees the gradients too."""

from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..heads import Correction
from ..registry import SIGNALS, STATES
from ..signals import read_gradients
from ..state import TaskState
from .average import AverageCore
from .core import Core, full_precision, tokens_of
from .memory import MemoryCore


@SIGNALS.register("both")
class BothCore(AverageCore):
    """`signal="both"`: the state also keeps the mean gradient of the chunks, as tensors `gradient_{name}`.

    The gradient of a chunk is that of its loss with respect to the state, as a query would have seen the state before
    this chunk. Only the correction uses the gradients. It starts at zero, so at first the state is the plain average.
    """

    accumulation = "both"
    uses_labels = True
    in_words = "The state also follows the gradient of each chunk's loss"
    fields = frozenset({"head", "second_order"})
    fingerprint = frozenset({"head", "initial_rate", "path_window"})

    @classmethod
    def make(cls, base: Base, config: IAIConfig) -> Core:
        return MemoryCore(base, config) if STATES[config.state_type].writes else super().make(base, config)

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        return not STATES[config.state_type].writes and super().reads_out(config)

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        if STATES[config.state_type].writes:
            if config.second_order:
                raise ValueError("second_order=True is not for state_type='prefix+lora', which writes in one pass")
            return
        if (config.accumulation, config.num_kept_tokens) != ("average", 0):
            raise ValueError(
                f"accumulation='recent' and num_kept_tokens need signal='observations', got signal='both' "
                f"with {config.accumulation!r} and {config.num_kept_tokens}"
            )
        if not config.correction:
            raise ValueError("signal='both' uses gradients in the correction, got correction=False: leave it True")

    def _make_correction(self, num_layers: int, num_heads: int, width: int) -> Correction:
        return Correction(num_layers, num_heads, width, gradients=True)

    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        tensors = super()._initial(base, batch_size)
        return tensors | {f"gradient_{name}": tensors[name].new_zeros(tensors[name].shape) for name in self.state.start}

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:  # (B, C) each
        return super().read(base, ids, mask, labels) | tokens_of(ids, mask, labels)

    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        chunk = (evidence[name] for name in ("ids", "mask", "labels"))
        with base.lora(self.config.lora_answers):
            seen = self.corrected(base, state)
            gradient = read_gradients(base, self.state, seen, *chunk, second_order=self.config.second_order)
        tensors = super()._next(base, state, evidence)
        with full_precision(state.step):
            share = 1 / (state.step + 1).view(-1, 1, 1, 1, 1)
            for name, now in gradient.items():
                mean = state.tensors[f"gradient_{name}"]
                tensors[f"gradient_{name}"] = mean.lerp(now, share.to(now.dtype).expand_as(now))
        return tensors

    def _gradient(self, state: TaskState) -> Tensor:  # (B, m, L, H, W)
        return self.state.pack({name: state.tensors[f"gradient_{name}"] for name in self.state.start})
