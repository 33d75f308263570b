"""The signal `observations`: what the base holds about a chunk after reading it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases.base import Base, KeysValues, positions_of


@dataclass
class Reading:
    """What one pass over [theta(0)][chunk][read-out slots] left behind; C tokens and P read-out slots."""

    hidden: Tensor  # (B, P, d) last hidden states of the slots
    keys_values: KeysValues  # per layer (B, H, C + P, D), of chunk and slots; [] of a base that keeps none
    mask: Tensor  # (B, C)
    positions: Tensor  # (B, C)
    surprisal: Tensor | None  # (B, C) in nats, of each token given those before it; None where not asked for


def read_observations(
    base: Base,
    state: nn.Module,  # of `hf_iai.states`
    ids: Tensor,  # (B, C)
    mask: Tensor,  # (B, C)
    *,
    surprisal: bool = False,
) -> Reading:
    """One pass over [theta(0)][chunk][read-out slots].

    Every chunk is read from theta(0), never from the current state: read-outs of different chunks are then
    commensurable, may be averaged, and can be read in one batch. Being last, the slots see the whole chunk; where they
    will become slots in front of a text they take their positions, 0..P-1, and else those after the chunk.
    """
    start = {name: tensor[None] for name, tensor in state.start.items()}
    num_slots = len(state.read_slots)
    slots = state.read_slots.to(base.embed(ids[:1, :1]).dtype).expand(len(ids), -1, -1)  # (B, P, d)
    with state.under(base, start) as prefix:
        positions = positions_of(mask) + base.num_slots(prefix)
        places = torch.arange(num_slots, device=ids.device).expand(len(ids), -1)
        if not state.num_slots_in_front:
            places = places + mask.sum(1, keepdim=True)
        hidden, keys_values = base.read(
            prefix,
            torch.cat([base.embed(ids), slots], 1),
            torch.cat([mask, mask.new_ones(len(mask), num_slots)], 1),
            torch.cat([positions, places], 1),
            record=ids.shape[1] + num_slots,
        )
    chunk, slots = hidden.split([ids.shape[1], num_slots], 1)
    return Reading(slots.float(), keys_values, mask, positions, base.surprisal(chunk, ids, mask) if surprisal else None)
