"""Pooling of a chunk's keys and values into slots."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases.places import ages_of


@dataclass
class Pooled:
    """P slots pooled from C tokens."""

    keys: Tensor  # (B, L, H, P, D)
    values: Tensor  # (B, L, H, P, D)
    mass: Tensor  # (B, L, H, P) sum of the tokens' shares in each slot
    address: Tensor  # (B, L, H, C, P) how near each token is to each slot; sums to 1 over the slots
    written: Tensor  # (B, L, H, P, C) each token's part of a slot; sums to 1 over the tokens


class TokenPooling(nn.Module):
    """Each slot is a weighted mean of the keys and values of a chunk's tokens:

        slot_j      = sum_t share(t, j) (k_t, v_t) / mass_j,        mass_j = sum_t share(t, j)
        share(t, j) = softmax_j(<norm(k_t), c_j> / sqrt(D)) * exp(<g, norm(k_t)> / sqrt(D) - rate_j * age_t)

    A token gives its largest share to the slot whose centroid c_j is nearest to its key. The centroids c start at the
    keys of real tokens, the importance g at 0. So even before training, a slot is an average of the base's own keys
    and values for the text. Keys are rotated to position 0 first, since only keys of the same position can be averaged.

    Args:
        centroids: first values of c, keys at position 0, (L, H, P, D).
    """

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        self.centroids = nn.Parameter(nn.functional.rms_norm(centroids, centroids.shape[-1:]).clone())
        self.importance = nn.Parameter(torch.zeros(*centroids.shape[:2], centroids.shape[-1]))  # (L, H, D)

    def forward(
        self,
        keys: Tensor,  # (B, L, H, C, D) at position 0
        values: Tensor,  # (B, L, H, C, D)
        mask: Tensor,  # (B, C)
        rate: Tensor,  # (L, H, P) forgetting rate per token, or a shape that broadcasts to it
    ) -> Pooled:
        """Pool the tokens of a chunk into P slots."""
        normed = nn.functional.rms_norm(keys, keys.shape[-1:]) / keys.shape[-1] ** 0.5
        address = torch.einsum("blhcd,lhmd->blhcm", normed, self.centroids).softmax(-1)
        importance = torch.einsum("blhcd,lhd->blhc", normed, self.importance).unsqueeze(-1)
        age = ages_of(mask)[:, None, None, :, None]
        share = address * (importance - rate.unsqueeze(-2) * age).exp() * mask[:, None, None, :, None]
        mass = share.sum(-2)  # (B, L, H, P)
        written = (share / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-2)).transpose(-1, -2)
        return Pooled(written @ keys, written @ values, mass, address, written)
