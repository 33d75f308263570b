"""The signal `observations`: what the base holds in m read-out slots after a chunk."""

import torch
from torch import Tensor, nn

from ..base import Base, positions_of


def read_observations(
    base: Base,
    state: nn.Module,  # PrefixState or PromptState
    ids: Tensor,  # (B, C)
    mask: Tensor,  # (B, C)
) -> tuple[dict[str, Tensor], Tensor]:
    """One pass over [theta(0)][chunk][read-out slots]: the slots in the layout of the state, and their last hidden
    states (B, m, d).

    Every chunk is read from theta(0), never from the current state: read-outs of different chunks are then
    commensurable, may be averaged, and can be read in one batch. The slots take positions 0..m-1, those of the state
    they will become, so that their keys need no re-placing in any base; being last, they see the whole chunk.
    """
    start = {name: tensor[None] for name, tensor in state.start.items()}
    prefix = state.keys_values(base, start)
    m = len(state.read_slots)
    slots = state.read_slots.to(base.embed(ids[:1, :1]).dtype).expand(len(ids), -1, -1)  # (B, m, d)
    hidden, keys_values = base.read(
        prefix,
        torch.cat([base.embed(ids), slots], 1),
        torch.cat([mask, mask.new_ones(len(mask), m)], 1),
        torch.cat([positions_of(mask) + m, torch.arange(m, device=ids.device).expand(len(ids), -1)], 1),
        record=m,
    )
    return state.read_out(hidden, keys_values), hidden.float()
