"""Prefixes: what stands in front of a text. Axes: B rows, m slots, H key/value heads, D head width, d hidden width."""

import torch
from torch import Tensor

KeysValues = list[tuple[Tensor, Tensor]]  # keys and values of every layer, (B, H, m, D) each
Prefix = KeysValues | Tensor  # what stands in front of a text; for a `RecurrentBase` embeddings (B, m, d)


class MaskedPrefix(list[tuple[Tensor, Tensor]]):
    """A prefix of which some slots are empty. No text attends to those, and they take no positions.

    Args:
        keys_values: keys and values of every layer, (B, H, m, D) each.
        mask: 1 for slots that hold something, 0 for empty ones, (B, m).
    """

    def __init__(self, keys_values: KeysValues, mask: Tensor) -> None:
        super().__init__(keys_values)
        self.mask = mask


def mask_of(prefix: Prefix, rows: int) -> Tensor | None:  # (rows, m)
    """The mask of a prefix's slots in front of each row of a text; None: all slots hold something."""
    if not isinstance(prefix, MaskedPrefix):
        return None
    return prefix.mask.repeat_interleave(rows // len(prefix.mask), 0)


def behind_prefix(mask: Tensor, prefix: KeysValues) -> Tensor:
    """Extend a mask of the text to one of prefix and text, (B, T) -> (B, m + T)."""
    slots = mask_of(prefix, len(mask))
    if slots is None:
        slots = mask.new_ones(len(mask), prefix[0][0].shape[-2])
    return torch.cat([slots.to(mask.dtype), mask], 1)


def match_rows(prefix: KeysValues, rows: int) -> KeysValues:
    """Repeat the rows of a prefix: row b of B stands in front of rows / B consecutive queries."""
    repeats = rows // len(prefix[0][0])
    if repeats == 1:
        return prefix
    return [(k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)) for k, v in prefix]
