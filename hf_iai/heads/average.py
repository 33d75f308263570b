"""The backbone of the state: a running average of read-outs, weighted by learned precision and age."""

import torch
from torch import Tensor, nn

from ..config import IAIConfig
from ..registry import HEADS, Part

MAX_LOG_PRECISION = 6.0  # one chunk never outweighs another by more than exp(2 * 6)
# Scalars that shape whole slots move as fast as their effect asks for, at the rate that suits weight matrices.
EXPONENT_SCALE, RATE_SCALE = 10.0, 0.03
MIN_MASS = 1e-4


@HEADS.register("gated")
class RunningAverage(nn.Module, Part):
    """slot(n) = sum_i w_i readout_i / sum_i w_i, with weights per slot, layer and head:

        w_i = exp(<a, norm(hidden_i)>) * mass_i^b * exp(-rate * tokens read after chunk i)

    All of a, b and rate are 0 at the start: the plain mean. A slot that no token of the chunk belongs to has weight 0.
    `mass` is how much of the chunk the slot holds; with b = 1 slots are averages over tokens, not chunks. A learned
    precision lets a slot abstain from a chunk; a learned forgetting rate lets some slots follow the text while others
    keep all of it. The state keeps sum_i w_i / n as `precision`: all that going on needs, and as bounded as the slots
    themselves.

    Args:
        num_layers, num_heads: of the state, L and H; 1 and 1 for a prompt.
        num_slots: P, the averaged slots.
        width: of the base's hidden states, d.
    """

    signals = frozenset({"observations", "both"})
    fields = frozenset({"accumulation", "correction", "pin_bos"})

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        if config.pin_bos and config.accumulation != "recent":
            raise ValueError(f"pin_bos=True needs accumulation='recent', got accumulation={config.accumulation!r}")

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        """In words, for model cards."""
        return f"accumulation: {config.accumulation}" + (", delta rule" if config.delta_rule else "")

    def __init__(self, num_layers: int, num_heads: int, num_slots: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers * num_heads, width))
        self.mass_exponent = nn.Parameter(torch.zeros(num_layers, num_heads, 1))
        self.forgetting = nn.Parameter(torch.zeros(num_layers, num_heads, num_slots))

    def precision(self, hidden: Tensor, mass: Tensor) -> Tensor:  # (B, P, d), (B, L, H, P) -> (B, L, H, P)
        score = nn.functional.rms_norm(hidden, hidden.shape[-1:]) @ self.weight.T  # (B, P, L * H)
        score = score.transpose(1, 2).unflatten(1, self.forgetting.shape[:2])
        score = score + EXPONENT_SCALE * self.mass_exponent * mass.clamp_min(MIN_MASS).log()
        return (MAX_LOG_PRECISION * torch.tanh(score / MAX_LOG_PRECISION)).exp() * (mass > 0)

    def rate(self) -> Tensor:  # (L, H, P)
        """Forgetting per token, at least 0."""
        rate = RATE_SCALE * self.forgetting
        # A rate below 0 counts as 0 but keeps its gradient, so that it can come back.
        return rate + (rate.clamp_min(0) - rate).detach()


def include(
    average: dict[str, Tensor],  # (B, L, H, P, D) each, and precision (B, L, H, P)
    readout: dict[str, Tensor],  # likewise
    step: Tensor,  # (B,) chunks in `average`
    retention: Tensor,  # (B, L, H, P) what is left of the average's weight
) -> dict[str, Tensor]:
    """The average of n chunks and one more; n = 0 gives the read-out itself."""
    n = step.view(-1, 1, 1, 1).to(readout["precision"].dtype)
    total = retention * n * average["precision"] + readout["precision"]
    share = (readout["precision"] / total.clamp_min(torch.finfo(total.dtype).tiny)).unsqueeze(-1)
    included = {name: average[name].lerp(readout[name], share) for name in readout if name != "precision"}
    return included | {"precision": total / (n + 1)}
