"""Gradients alone: each chunk moves the state by the gradient of its loss."""

from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..heads import bounded
from ..registry import HEADS, SIGNALS
from ..signals import read_gradients
from ..state import TaskState
from .core import full_precision
from .signal import SignalCore


@SIGNALS.register("gradients")
class GradientCore(SignalCore):
    """`signal="gradients"`: theta(i+1) = head(theta(i), d loss(chunk(i) | theta(i)) / d theta(i))."""

    accumulation = "gradients"
    uses_labels = True
    default_head = "learned_optimizer"
    in_words = "Each chunk moves the state by the gradient of its loss"
    fields = frozenset({"head", "second_order", "initial_rate"})
    fingerprint = frozenset({"head", "initial_rate", "path_window"})

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        if config.initial_rate is not None and config.initial_rate <= 0:
            raise ValueError(f"initial_rate must be above 0, got {config.initial_rate}")
        if config.num_kept_tokens or config.delta_rule:
            raise ValueError(
                "num_kept_tokens and delta_rule need signal='observations' or 'both', got signal='gradients' with "
                f"{config.num_kept_tokens} and {config.delta_rule}: leave them out"
            )

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        return False

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config, reads=False)
        if config.initial_rate is None:  # the rate is saved with the adapter, since learned rates are relative to it
            config.initial_rate = HEADS[config.head].first_rate(self.state)
        self.head = HEADS[config.head].make(self.state, config)

    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        theta = self.state.initial(batch_size)
        return theta | self.head.initial(theta)

    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        start = dict(self.state.start.items())
        theta = {name: state.tensors[name] for name in start}
        kept = {name: t for name, t in state.tensors.items() if name not in theta}
        gradient = self._gradient(base, theta, evidence)
        with full_precision(state.step):
            theta, kept = self.head(theta, kept, gradient, state.step, start)
            return bounded(theta, start) | kept

    def _gradient(self, base: Base, theta: dict[str, Tensor], evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        chunk = (evidence[name] for name in ("ids", "mask", "labels"))
        with base.lora(self.config.lora_answers):
            return read_gradients(base, self.state, theta, *chunk, second_order=self.config.second_order)
