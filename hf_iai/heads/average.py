"""The backbone of the state: a running, mergeable, precision-weighted average of read-outs."""

import torch
from torch import Tensor, nn

MAX_LOG_PRECISION = 6.0  # one chunk never outweighs another by more than exp(2 * 6)


class RunningAverage(nn.Module):
    """slot(n) = sum_i w_i readout_i / sum_i w_i, with a learned precision w_i per slot, layer and head.

    w_i = exp(<a, norm(hidden_i)> + b log(tokens_i)), with a = b = 0 at the start: the plain mean. A slot that finds
    nothing in a chunk can so abstain from it. The state keeps the mean precision sum_i w_i / n, all that going on or
    merging needs, and as bounded as the slots themselves.

    Args:
        num_layers, num_heads: of the state, L and H; 1 and 1 for a prompt.
        width: of the base's hidden states, d.
    """

    def __init__(self, num_layers: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.groups = num_layers, num_heads
        self.weight = nn.Parameter(torch.zeros(num_layers * num_heads, width))
        self.length_exponent = nn.Parameter(torch.zeros(num_layers * num_heads))

    def precision(self, hidden: Tensor, num_tokens: Tensor) -> Tensor:  # (B, m, d), (B,) -> (B, L, H, m)
        score = nn.functional.rms_norm(hidden, hidden.shape[-1:]) @ self.weight.T  # (B, m, L * H)
        score = score + num_tokens.clamp_min(1).float().log().view(-1, 1, 1) * self.length_exponent
        bounded = MAX_LOG_PRECISION * torch.tanh(score / MAX_LOG_PRECISION)
        return bounded.exp().transpose(1, 2).unflatten(1, self.groups)


def include(
    average: dict[str, Tensor],  # (B, L, H, m, D) each, and precision (B, L, H, m)
    readout: dict[str, Tensor],  # likewise
    step: Tensor,  # (B,) chunks in `average`
) -> dict[str, Tensor]:
    """The average of n chunks and one more; n = 0 gives the read-out itself."""
    n = step.view(-1, 1, 1, 1).to(readout["precision"].dtype)
    total = n * average["precision"] + readout["precision"]
    share = (readout["precision"] / total).unsqueeze(-1)
    included = {name: average[name].lerp(readout[name], share) for name in readout if name != "precision"}
    return included | {"precision": total / (n + 1)}
