"""Heads that take gradient steps with learned rates: MAML, Meta-SGD, path-aware.

Axes: B tasks. All heads that use gradients have the same `forward`:

    theta: the tensors of the state, name -> (B, ...).
    kept: what the head stores in the state beside theta, such as averages, name -> (B, ...).
    gradient: the gradient of the chunk's loss with respect to theta, name -> (B, ...).
    step: how many chunks were read before, (B,).
    start: theta(0), name -> (...).

It returns the next theta and the next `kept`.
"""

import torch
from torch import Tensor, nn

from ..config import IAIConfig
from ..registry import HEADS, STATES, Part
from ..tensors import along, clamp_with_gradient

# Rates are learned as logarithms. The factor lets them train well at the learning rate of the weight matrices.
LOG_SCALE = 10.0
Tensors = dict[str, Tensor]


class GradientHead(nn.Module, Part):
    """Base of the heads that move a state by the gradients of its chunks."""

    signals = frozenset({"gradients"})

    @classmethod
    def fits(cls, config: IAIConfig) -> bool:
        """Whether this head can update such a state."""
        return config.signal in cls.signals or (config.signal == "both" and STATES[config.state_type].writes)

    @classmethod
    def first_rate(cls, state: nn.Module) -> float:
        """The initial value of the rates, if the configuration names none."""
        return state.initial_rate

    @classmethod
    def make(cls, state: nn.Module, config: IAIConfig) -> "GradientHead":
        """Make the head of an adapter.

        Args:
            state: one of `hf_iai.states`.
            config: the adapter's configuration.
        """
        return cls({name: t.detach() for name, t in state.start.items()}, config.initial_rate)

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        """A description in words, for model cards."""
        return f"head: {config.head}, {'second' if config.second_order else 'first'} order in training"


@HEADS.register("sgd")
class SGD(GradientHead):
    """theta' = theta - rate * gradient, with one learned rate per tensor. Together with a learned theta(0) it is MAML.

    Rates are learned as logarithms, so they stay above 0.

    Args:
        start: theta(0), name -> (...).
        rate: initial value of every rate.

    Source: Finn et al., arXiv 1703.03400, equation 1.
    """

    def __init__(self, start: Tensors, rate: float) -> None:
        super().__init__()
        self.initial_rate = rate
        self.log_rate = nn.ParameterDict({name: nn.Parameter(self._like(t)) for name, t in start.items()})

    def _like(self, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(1)  # FSDP takes no scalars

    def rate(self, name: str) -> Tensor:
        """The learned rate of a tensor."""
        return self.initial_rate * (LOG_SCALE * self.log_rate[name]).exp()

    def initial(self, theta: Tensors) -> Tensors:
        """What the head stores in the state before anything was read. Plain SGD stores nothing."""
        return {}

    def forward(
        self, theta: Tensors, kept: Tensors, gradient: Tensors, step: Tensor, start: Tensors
    ) -> tuple[Tensors, Tensors]:
        return {name: t - self.rate(name) * gradient[name] for name, t in theta.items()}, {}

    def extra_repr(self) -> str:
        return f"initial_rate={self.initial_rate}"


@HEADS.register("meta_sgd")
class MetaSGD(SGD):
    """theta' = theta - rate * gradient, with one learned rate per coordinate.

    Source: Li et al., arXiv 1707.09835, equation 1. Unlike there, the logarithm of the rate is learned.
    """

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)


@HEADS.register("path_aware")
class PathAware(MetaSGD):
    """Meta-SGD that after every w-th step also moves back towards theta as it was w steps before:

        theta' = theta - Q gradient
        theta' = (1 - P) theta' + P theta(j - w)            after every w-th step j

    Q and P are diagonal: Q is one learned rate per coordinate, P one learned share per coordinate, which starts at 0
    and is clamped to 0..1. The state stores theta(j - w) as `old_{name}`. In the source, Q and P differ from step to
    step; here they are the same at all steps, so any number of steps can be taken.

    Args:
        start: theta(0), name -> (...).
        rate: initial value of every rate.
        window: w, in steps.

    Source: Rajasegaran et al., Meta-learning the learning trends shared across tasks, arXiv 2010.09291.
    """

    fields = frozenset({"path_window"})

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        if config.path_window < 1:
            raise ValueError(f"path_window must be at least 1, got {config.path_window}")

    @classmethod
    def make(cls, state: nn.Module, config: IAIConfig) -> "PathAware":
        return cls({name: t.detach() for name, t in state.start.items()}, config.initial_rate, config.path_window)

    def __init__(self, start: Tensors, rate: float, window: int) -> None:
        super().__init__(start, rate)
        self.window = window
        self.skip = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(t)) for name, t in start.items()})

    def share(self, name: str) -> Tensor:
        """P, clamped to 0..1."""
        return clamp_with_gradient(self.skip[name], 0, 1)

    def initial(self, theta: Tensors) -> Tensors:
        return {f"old_{name}": t for name, t in theta.items()}

    def forward(
        self, theta: Tensors, kept: Tensors, gradient: Tensors, step: Tensor, start: Tensors
    ) -> tuple[Tensors, Tensors]:
        moved, _ = super().forward(theta, kept, gradient, step, start)
        after, old = {}, {}
        for name, t in moved.items():
            due = along((step + 1) % self.window == 0, t)
            before = kept[f"old_{name}"]
            after[name] = torch.where(due, t.lerp(before, self.share(name).expand_as(t)), t)
            old[f"old_{name}"] = torch.where(due, after[name], before)
        return after, old

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"
