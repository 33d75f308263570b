"""Gradient steps with learned rates: MAML's, Meta-SGD's, path-aware.

Axes: B tasks. A head takes theta, what it keeps beside it, the gradient, all name -> (B, ...), and the chunks read
so far (B,), and theta(0), name -> (...); it returns the next theta and what it keeps.
"""

import torch
from torch import Tensor, nn

from ..config import IAIConfig
from ..registry import HEADS, Part

# Learned logarithms move as fast as their effect asks for, at the learning rate that suits weight matrices.
LOG_SCALE = 10.0
Tensors = dict[str, Tensor]


class GradientHead(nn.Module, Part):
    """A head that moves a state by the gradients of its chunks."""

    signals = frozenset({"gradients"})

    @classmethod
    def make(cls, state: nn.Module, config: IAIConfig) -> "GradientHead":
        """The head of an adapter, for a state type of `hf_iai.states`."""
        return cls({name: t.detach() for name, t in state.start.items()}, config.initial_rate)

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        """In words, for model cards."""
        return f"head: {config.head}, {'second' if config.second_order else 'first'} order in training"


@HEADS.register("sgd")
class SGD(GradientHead):
    """theta' = theta - rate * gradient, one learned rate per tensor of the state; with theta(0), this is MAML.

    The logarithm of each rate is learned, so rates stay above 0.

    Args:
        start: theta(0), name -> (...).
        rate: what every rate starts as.

    Source: Finn et al., arXiv 1703.03400, equation 1.
    """

    def __init__(self, start: Tensors, rate: float) -> None:
        super().__init__()
        self.initial_rate = rate
        self.log_rate = nn.ParameterDict({name: nn.Parameter(self._like(t)) for name, t in start.items()})

    def _like(self, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(1)  # FSDP takes no scalars

    def rate(self, name: str) -> Tensor:
        return self.initial_rate * (LOG_SCALE * self.log_rate[name]).exp()

    def initial(self, theta: Tensors) -> Tensors:
        """What is kept beside theta, before anything was read: nothing."""
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

    Source: Li et al., arXiv 1707.09835, equation 1; here the logarithm is learned.
    """

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)


@HEADS.register("path_aware")
class PathAware(MetaSGD):
    """theta' = theta - Q gradient; after every w-th step theta' = (1 - P) theta' + P theta(j - w), Q and P diagonal.

    theta(j - w) is kept in the state, as `old_{name}`. Q is a rate per coordinate, P starts at 0 and is held in 0..1.
    Unlike the source's, Q and P are the same at every step, so any number of steps can be taken.

    Args:
        start, rate: see `SGD`.
        window: w.

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
        """P; beyond 0..1 it counts as the bound but keeps its gradient, so that it can come back."""
        share = self.skip[name]
        return share + (share.clamp(0, 1) - share).detach()

    def initial(self, theta: Tensors) -> Tensors:
        return {f"old_{name}": t for name, t in theta.items()}

    def forward(
        self, theta: Tensors, kept: Tensors, gradient: Tensors, step: Tensor, start: Tensors
    ) -> tuple[Tensors, Tensors]:
        moved, _ = super().forward(theta, kept, gradient, step, start)
        after, old = {}, {}
        for name, t in moved.items():
            due = ((step + 1) % self.window == 0).view(-1, *[1] * (t.dim() - 1))
            before = kept[f"old_{name}"]
            after[name] = torch.where(due, t.lerp(before, self.share(name).expand_as(t)), t)
            old[f"old_{name}"] = torch.where(due, after[name], before)
        return after, old

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"
