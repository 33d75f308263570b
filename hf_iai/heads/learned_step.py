"""A learned optimizer: preconditioned SGD with learned rates, plus a step that a small network gives per coordinate.

Axes: B tasks, F features, h hidden width, M momenta, S second moments. The same network serves all tensors of a task,
whatever their shape.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import IAIConfig
from ..registry import HEADS
from ..tensors import along, zero_linear
from .classical import GradientHead, Tensors
from .guards import first_trust, rms, trusted, updated_trust
from .step_settings import LearnedStepSettings

KEPT_KINDS = ("momentum", "second", "row", "column")
TINY = 1e-20


@HEADS.register("learned_optimizer")
class LearnedStep(GradientHead):
    """A learned optimizer for the tensors of a state:

        theta' = theta - rate P gradient - s rms(theta) u / max(1, rms(u))
        u      = d exp(a),  (d, a) = net(features)

    The network's features of a coordinate are its gradient, its value, momenta, second moments, their ratios, and the
    row and column means of the squared gradient, each divided by its root mean square over the tensor. A coordinate
    also sees tanh(t / tau - 1) for several times tau, where t is the number of chunks read. So no learned weight
    belongs to a particular step. P is diagonal: (second moment / its mean)^(-p/2). Rate, s and p are learned for each
    kind of tensor: `key` and `value` of a prefix, `A` and `B` of a low-rank update.

    The last layer and p start at zero, which is SGD. The network's part has a root mean square of at most s rms(theta).
    If the gradient is zero everywhere, nothing moves.

    Two guards protect the state. Before the step, a gradient over all tensors that is longer than `largest_surprise`
    times the mean length of the gradients before is scaled down to that length. Otherwise a single long step could put
    a low-rank update where all gradients are large, and it would stay there. After the step, `heads.guards` partly
    undoes steps that raise the loss of newly read text, and makes the following steps smaller.

    The state stores, beside theta: `momentum_{name}` (B, M, ...); `second_{name}` (B, S, ...); `row_{name}` and
    `column_{name}`, the means of the squared gradient over the last axis and over the last but one; `gradient_length`
    (B,), the mean length of the gradients; `slope`, `slope_square` and `trust` (B,).

    Args:
        kinds: name of each tensor -> its kind.
        rate: initial value of every rate.
        settings: hyperparameters fixed at training time; loaded weights need the settings they were trained with.

    Source: features after Metz et al., arXiv 2203.11860; normed steps after CELO, arXiv 2501.12670.
    """

    fields = fingerprint_if_changed = frozenset({"learned_optimizer"})

    @classmethod
    def is_default(cls, config: IAIConfig, name: str) -> bool:
        return getattr(config, name) in (None, LearnedStepSettings().to_dict())

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        # All settings are saved, so that later changes of the defaults leave trained adapters as they are.
        config.learned_optimizer = LearnedStepSettings.from_dict(config.learned_optimizer).to_dict()

    @classmethod
    def make(cls, state: nn.Module, config: IAIConfig) -> "LearnedStep":
        settings = LearnedStepSettings.from_dict(config.learned_optimizer)
        return cls({name: state.tensor_kind(name) for name in state.start}, config.initial_rate, settings)

    def __init__(self, kinds: dict[str, str], rate: float, settings: LearnedStepSettings) -> None:
        super().__init__()
        self.kinds, self.initial_rate, self.settings = kinds, rate, settings
        hidden, num_features = settings.hidden, _num_features(settings)
        self.log_rate, self.log_step, self.power = (_zero_for_each(kinds.values()) for _ in range(3))
        self.read, self.read_times = nn.Linear(num_features, hidden), nn.Linear(len(settings.times), hidden, bias=False)
        self.middle, self.write = nn.Linear(hidden, hidden), zero_linear(hidden, 2)

    def initial(self, theta: Tensors) -> Tensors:
        """What the state stores beside theta before anything was read."""
        first, settings = next(iter(theta.values())), self.settings
        kept = {"gradient_length": first.new_zeros(len(first)), **first_trust(first)}
        for name, t in theta.items():
            kept[f"momentum_{name}"] = t.new_zeros(len(t), len(settings.momentum_decays), *t.shape[1:])
            kept[f"second_{name}"] = t.new_zeros(len(t), len(settings.second_decays), *t.shape[1:])
            kept[f"row_{name}"], kept[f"column_{name}"] = (
                t.new_zeros(t.shape[:-1]),
                t.new_zeros(*t.shape[:-2], t.shape[-1]),
            )
        return kept

    def forward(
        self, theta: Tensors, kept: Tensors, gradient: Tensors, step: Tensor, start: Tensors
    ) -> tuple[Tensors, Tensors]:
        slope = sum(
            (g * (theta[name] - start[name])).detach().flatten(1).sum(1) for name, g in gradient.items()
        )  # (B,)
        trust, less = updated_trust(kept, slope, self.settings.doubt)
        length = torch.stack([g.detach().flatten(1).square().sum(1) for g in gradient.values()]).sum(0).sqrt()  # (B,)
        scale, mean = self.clipped(kept["gradient_length"], length)
        after, kept_after = {}, {"gradient_length": mean, **trust}
        gradient = {name: g * along(scale, g) for name, g in gradient.items()}
        for name, t in theta.items():
            averages = self.accumulated({kind: kept[f"{kind}_{name}"] for kind in KEPT_KINDS}, gradient[name])
            stepped = self.stepped(self.kinds[name], t, averages, gradient[name], step)
            after[name] = trusted(t, stepped, start[name], less, trust["trust"])
            kept_after |= {f"{kind}_{name}": a for kind, a in averages.items()}
        return after, kept_after

    def clipped(self, mean: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:  # (B,) each
        """Scale down a gradient that is much longer than those before; a gradient of length zero is ignored.

        Args:
            mean: mean length of the gradients before.
            length: length of this gradient.

        Returns:
            The factor for this gradient, and the new mean length.
        """
        most = torch.where(mean > 0, self.settings.largest_surprise * mean, length)
        scale = torch.where(length > most, most / length, torch.ones_like(length))
        after = torch.where(mean > 0, mean.lerp(length.minimum(most), 1 - self.settings.length_decay), length)
        return scale, torch.where(length > 0, after, mean)

    def accumulated(self, averages: Tensors, gradient: Tensor) -> Tensors:
        """Add one more gradient (B, ...) to the running averages of a tensor."""
        square, decays = gradient.square(), self.settings.decays
        new = {
            "momentum": gradient.unsqueeze(1),
            "second": square.unsqueeze(1),
            "row": square.mean(-1),
            "column": square.mean(-2),
        }
        return {kind: averages[kind].lerp(value, 1 - _decay(decays[kind], value)) for kind, value in new.items()}

    def stepped(
        self,
        kind: str | None,
        theta: Tensor,  # (B, ...)
        averages: Tensors,  # running averages that include this gradient
        gradient: Tensor,  # (B, ...)
        step: Tensor,  # (B,) number of gradients before this one
    ) -> Tensor:  # (B, ...)
        """The tensor after one step. With kind None it uses the mean over all kinds of what is learned per kind."""
        settings = self.settings
        averages = without_bias(averages, step + 1, settings.decays)
        rate = self.initial_rate * (settings.log_scale * self._of_kind(self.log_rate, kind)).exp()
        theta_after = theta - rate * self._precondition(kind, averages) * gradient
        size = settings.step_size * (settings.log_scale * self._of_kind(self.log_step, kind)).exp()
        size = size * rms(theta.detach()).clamp_min(settings.smallest_rms)
        moving = along(gradient.detach().flatten(1).any(1), theta)
        return theta_after - moving * size * self._direction(features(theta, averages, gradient), step)

    @staticmethod
    def _of_kind(values: nn.ParameterDict, kind: str | None) -> Tensor:
        return torch.stack(list(values.values())).mean() if kind is None else values[kind]

    def _precondition(self, kind: str | None, averages: Tensors) -> Tensor:  # (B, ...)
        root = (averages["second"][:, -1] + TINY).sqrt()
        ratio = (root / rms(root)).clamp_min(1 / self.settings.largest_precondition)
        return (-self.settings.log_scale * self._of_kind(self.power, kind) * ratio.log()).exp()

    def _direction(self, inputs: Tensor, step: Tensor) -> Tensor:  # (B, ..., F), (B,) -> (B, ...)
        times = torch.tanh(step.unsqueeze(-1) / inputs.new_tensor(self.settings.times) - 1)  # (B, times)
        x = self.read(inputs) + self.read_times(times).view(len(step), *[1] * (inputs.dim() - 2), -1)
        direction, magnitude = self.write(self.middle(x.relu()).relu()).unbind(-1)
        most = self.settings.most_log_magnitude
        u = direction * (most * torch.tanh(magnitude / most)).exp()
        return u / rms(u.detach()).clamp_min(1)

    def extra_repr(self) -> str:
        return f"initial_rate={self.initial_rate}, kinds={sorted(set(self.kinds.values()))}"


def _zero_for_each(kinds: Iterable[str]) -> nn.ParameterDict:
    return nn.ParameterDict({kind: nn.Parameter(torch.zeros(1)) for kind in sorted(set(kinds))})


def without_bias(averages: Tensors, count: Tensor, decays: dict[str, float | tuple[float, ...]]) -> Tensors:
    """Correct running averages for their start at zero, as Adam does, after `count` (B,) gradients."""
    scaled = {}
    for kind, t in averages.items():
        seen = 1 - _decay(decays[kind], t) ** along(count, t)
        scaled[kind] = t / seen
    return scaled


def _decay(decay: float | tuple[float, ...], like: Tensor) -> Tensor:
    """As a tensor that broadcasts to `like`; a tuple has one decay for each place of axis 1."""
    return (
        like.new_tensor(decay).view(1, -1, *[1] * (like.dim() - 2))
        if isinstance(decay, tuple)
        else like.new_tensor(decay)
    )


def _num_features(settings: LearnedStepSettings) -> int:
    """F, the number of `features`: seven, 3 more for each momentum and 2 more for each second moment."""
    return 7 + 3 * len(settings.momentum_decays) + 2 * len(settings.second_decays)


def features(theta: Tensor, averages: Tensors, gradient: Tensor) -> Tensor:  # (B, ...) -> (B, ..., F)
    """The network's inputs for each coordinate."""
    row, column = averages["row"].unsqueeze(-1), averages["column"].unsqueeze(-2)
    factored = row * column / (row.mean(-2, keepdim=True) + TINY)
    momenta, seconds = averages["momentum"].unbind(1), averages["second"].unbind(1)
    per_second, per_factored = [(s + TINY).rsqrt() for s in seconds], (factored + TINY).rsqrt()
    found = [gradient, theta, *momenta, *((s + TINY).sqrt() for s in seconds)]
    found += [gradient * scale for scale in per_second] + [m * per_second[-1] for m in momenta]
    found += [(t + TINY).sqrt().expand_as(theta) for t in (row, column)]
    found += [gradient * per_factored, *(m * per_factored for m in momenta), per_second[-1], per_factored]
    return torch.stack(
        [f * (f.square().mean(tuple(range(1, f.dim())), keepdim=True) + TINY).rsqrt() for f in found], -1
    )
