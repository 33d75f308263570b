"""The signal `observations`: read-outs, the base's hidden states, keys and values after it has read a chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases.base import Base
from ..bases.places import positions_of
from ..bases.prefixes import KeysValues


@dataclass
class Reading:
    """The results of one pass over [theta(0)][chunk][read-out slots], with C tokens and P read-out slots."""

    hidden: Tensor  # (B, P, d) last hidden states of the slots
    keys_values: KeysValues  # per layer (B, H, C + P, D), of chunk and slots; [] if the base has no keys and values
    mask: Tensor  # (B, C)
    positions: Tensor  # (B, C)
    surprisal: Tensor | None  # (B, C) -log p(token | tokens before it) in nats; None if it was not asked for


def read_observations(
    base: Base,
    state: nn.Module,  # one of `hf_iai.states`
    ids: Tensor,  # (B, C)
    mask: Tensor,  # (B, C)
    *,
    surprisal: bool = False,
) -> Reading:
    """Read a chunk in one pass over [theta(0)][chunk][read-out slots].

    Every chunk is read from theta(0), never from the current state. So the read-outs of different chunks are
    comparable, can be averaged, and can be read in one batch. The slots come last and see the whole chunk. If they are
    to become slots in front of a text, they already have the positions 0..P-1 of those slots. Otherwise their positions
    follow the chunk.

    Args:
        base: the pretrained model.
        state: holds theta(0) and the embeddings of the read-out slots.
        ids: token ids of the chunk.
        mask: 1 for real tokens, 0 for padding.
        surprisal: whether to compute the surprisal of every token too.
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
