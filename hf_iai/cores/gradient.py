"""Gradients alone: each chunk's loss under the state moves the state."""

from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..heads import SGD, LearnedStep, LearnedStepSettings, MetaSGD, PathAware, bounded
from ..signals import read_gradients
from ..state import TaskState
from .core import Core, full_precision

# What the first rates are; measured with the embedded base, see docs/gradients.md. Of mlp 0.03 to 0.3 learn alike.
RATES = {"prompt": 3.0, "prefix": 30.0, "lora": 1.0, "mlp": 0.1}


class GradientCore(Core):
    """`signal="gradients"`: theta(i+1) = head(theta(i), d loss(chunk(i) | theta(i)) / d theta(i))."""

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config, reads=False)
        if config.initial_rate is None:  # saved with the adapter: learned rates are relative to it
            config.initial_rate = RATES[config.state_type]
        self.head = self._make_head()

    def _make_head(self) -> SGD | LearnedStep:
        start, config = dict(self.state.start.items()), self.config
        rate = config.initial_rate
        if config.head == "learned_optimizer":
            settings = LearnedStepSettings.from_dict(config.learned_optimizer)
            return LearnedStep({name: self.state.kind(name) for name in start}, rate, settings)
        start = {name: t.detach() for name, t in start.items()}
        if config.head == "path_aware":
            return PathAware(start, rate, config.path_window)
        return {"sgd": SGD, "meta_sgd": MetaSGD}[config.head](start, rate)

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
        with base.lora(self.config.regime == "explicit"):
            return read_gradients(base, self.state, theta, *chunk, second_order=self.config.second_order)
