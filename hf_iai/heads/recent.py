"""The control: a state that is the last m tokens, "fewer shots"."""

import torch
from torch import Tensor


def push_tokens(
    recent: Tensor,  # (B, m) ids, real ones first
    count: Tensor,  # (B,) how many are real
    ids: Tensor,  # (B, C)
    mask: Tensor,  # (B, C)
) -> tuple[Tensor, Tensor]:
    """First in, first out: the last m real tokens of [recent][ids], real ones first, and their number."""
    m = recent.shape[1]
    kept = torch.arange(m, device=ids.device) < count[:, None]
    everything, real = torch.cat([recent, ids], 1), torch.cat([kept, mask.bool()], 1)
    # A stable sort brings the real tokens, in order, to the right end; then the last m are moved to the left.
    right = everything.gather(1, real.long().sort(dim=1, stable=True).indices)[:, -m:]
    count = real.sum(1).clamp_max(m)
    columns = (torch.arange(m, device=ids.device) - count[:, None]) % m
    return right.gather(1, columns), count
