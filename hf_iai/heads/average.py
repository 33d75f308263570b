"""The running average of read-outs that a state starts from. Chunks are weighted by learned precision and by age."""

import torch
from torch import Tensor, nn

from ..config import IAIConfig
from ..registry import HEADS, STATES, Part
from ..tensors import clamp_with_gradient

MAX_LOG_PRECISION = 6.0  # so one chunk outweighs another by at most exp(2 * 6)
# These scalars act on whole slots. The factors let them train well at the learning rate of the weight matrices.
EXPONENT_SCALE, RATE_SCALE = 10.0, 0.03
MIN_MASS = 1e-4


@HEADS.register("gated")
class RunningAverage(nn.Module, Part):
    """A weighted mean of the read-outs of all chunks, with learned weights for every slot, layer and head:

        slot(n) = sum_i w_i readout_i / sum_i w_i
        w_i     = exp(<a, norm(hidden_i)>) * mass_i^b * exp(-rate * tokens read after chunk i)

    a, b and rate are learned and start at 0, which is the plain mean over chunks. `mass` says how much of the chunk
    went into the slot. With b = 1 a slot averages over tokens instead of over chunks. A slot that got no token of the
    chunk has weight 0.

    The precision exp(<a, norm(hidden_i)>) lets a slot ignore a chunk. The forgetting rate lets some slots follow the
    recent text while others keep all of it. To continue the average later, the state stores sum_i w_i / n as
    `precision`. It is as bounded as the slots are.

    Args:
        num_layers: L, layers of the state; 1 for a prompt.
        num_heads: H, key/value heads of the state; 1 for a prompt.
        num_slots: P, how many slots are averaged.
        width: d, width of the base's hidden states.
    """

    signals = frozenset({"observations", "both"})
    fields = frozenset({"accumulation", "correction", "pin_bos"})

    @classmethod
    def fits(cls, config: IAIConfig) -> bool:
        """Whether this head can update such a state."""
        return config.signal in cls.signals and not STATES[config.state_type].writes

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        if config.pin_bos and config.state_type not in ("prefix", "prompt"):
            raise ValueError(f"pin_bos=True needs state_type='prefix' or 'prompt', got {config.state_type!r}")

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        """A description in words, for model cards."""
        return f"accumulation: {config.accumulation}" + (", delta rule" if config.delta_rule else "")

    def __init__(self, num_layers: int, num_heads: int, num_slots: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers * num_heads, width))
        self.mass_exponent = nn.Parameter(torch.zeros(num_layers, num_heads, 1))
        self.forgetting = nn.Parameter(torch.zeros(num_layers, num_heads, num_slots))

    def precision(self, hidden: Tensor, mass: Tensor) -> Tensor:  # (B, P, d), (B, L, H, P) -> (B, L, H, P)
        """The weight of a chunk in the average, before any forgetting."""
        score = nn.functional.rms_norm(hidden, hidden.shape[-1:]) @ self.weight.T  # (B, P, L * H)
        score = score.transpose(1, 2).unflatten(1, self.forgetting.shape[:2])
        score = score + EXPONENT_SCALE * self.mass_exponent * mass.clamp_min(MIN_MASS).log()
        return (MAX_LOG_PRECISION * torch.tanh(score / MAX_LOG_PRECISION)).exp() * (mass > 0)

    def rate(self) -> Tensor:  # (L, H, P)
        """The forgetting rate per token, at least 0."""
        return clamp_with_gradient(RATE_SCALE * self.forgetting, low=0)


def include(
    average: dict[str, Tensor],  # (B, L, H, P, D) each, and precision (B, L, H, P)
    readout: dict[str, Tensor],  # the same shapes
    step: Tensor,  # (B,) chunks in `average`
    retention: Tensor,  # (B, L, H, P) share of the average's weight that is not forgotten, 0 to 1
) -> dict[str, Tensor]:
    """Add the read-out of one chunk to the average of n chunks. With n = 0 the result is the read-out itself."""
    n = step.view(-1, 1, 1, 1).to(readout["precision"].dtype)
    total = retention * n * average["precision"] + readout["precision"]
    share = (readout["precision"] / total.clamp_min(torch.finfo(total.dtype).tiny)).unsqueeze(-1)
    included = {name: average[name].lerp(readout[name], share) for name in readout if name != "precision"}
    return included | {"precision": total / (n + 1)}
