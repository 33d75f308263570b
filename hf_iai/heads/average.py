"""The backbone of the state: a running average of read-outs, weighted by learned precision and age."""

import torch
from torch import Tensor, nn

MAX_LOG_PRECISION = 6.0  # one chunk never outweighs another by more than exp(2 * 6)
RATE_SCALE = 30.0  # so that a forgetting rate can leave 0 within the first hundreds of optimizer steps


class RunningAverage(nn.Module):
    """slot(n) = sum_i w_i readout_i / sum_i w_i, with weights per slot, layer and head:

        w_i = exp(<a, norm(hidden_i)> + b log(tokens_i) - rate * age_i)

    All of a, b and rate are 0 at the start: the plain mean. A learned precision lets a slot abstain from a chunk that
    holds nothing for it; a learned forgetting rate lets some slots follow the text while others keep all of it. The
    state keeps sum_i w_i / n as `precision`: all that going on needs, and as bounded as the slots themselves.

    Args:
        num_layers, num_heads: of the state, L and H; 1 and 1 for a prompt.
        num_slots: m.
        width: of the base's hidden states, d.
    """

    def __init__(self, num_layers: int, num_heads: int, num_slots: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers * num_heads, width))
        self.length_exponent = nn.Parameter(torch.zeros(num_layers * num_heads))
        self.rate = nn.Parameter(torch.zeros(num_layers, num_heads, num_slots))

    def precision(self, hidden: Tensor, num_tokens: Tensor) -> Tensor:  # (B, m, d), (B,) -> (B, L, H, m)
        score = nn.functional.rms_norm(hidden, hidden.shape[-1:]) @ self.weight.T  # (B, m, L * H)
        score = score + num_tokens.clamp_min(1).float().log().view(-1, 1, 1) * self.length_exponent
        bounded = MAX_LOG_PRECISION * torch.tanh(score / MAX_LOG_PRECISION)
        return bounded.exp().transpose(1, 2).unflatten(1, self.rate.shape[:2])

    def retention(self) -> Tensor:  # (L, H, m)
        """What is left of a weight after one more chunk, in (0, 1]."""
        rate = RATE_SCALE * self.rate
        # A rate below 0 counts as 0 but keeps its gradient, so that it can come back.
        return (-(rate + (rate.clamp_min(0) - rate).detach())).exp()


def include(
    average: dict[str, Tensor],  # (B, L, H, m, D) each, and precision (B, L, H, m)
    readout: dict[str, Tensor],  # likewise
    step: Tensor,  # (B,) chunks in `average`
    retention: Tensor | float,  # (L, H, m)
) -> dict[str, Tensor]:
    """The average of n chunks and one more; n = 0 gives the read-out itself."""
    n = step.view(-1, 1, 1, 1).to(readout["precision"].dtype)
    total = retention * n * average["precision"] + readout["precision"]
    share = (readout["precision"] / total).unsqueeze(-1)
    included = {name: average[name].lerp(readout[name], share) for name in readout if name != "precision"}
    return included | {"precision": total / (n + 1)}
