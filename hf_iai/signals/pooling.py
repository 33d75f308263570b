"""A chunk's own keys and values, pooled into slots."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases.base import ages_of


@dataclass
class Pooled:
    """P slots pooled from C tokens."""

    keys: Tensor  # (B, L, H, P, D)
    values: Tensor  # (B, L, H, P, D)
    mass: Tensor  # (B, L, H, P)
    address: Tensor  # (B, L, H, C, P) nearness of each token to the slots, sums to 1 over them
    written: Tensor  # (B, L, H, P, C) what each slot is made of, sums to 1 over the tokens


class TokenPooling(nn.Module):
    """slot_j = sum_t share(t, j) (k_t, v_t) / mass_j with mass_j = sum_t share(t, j), over the tokens of a chunk.

    Every token gives most to the slot whose centroid is nearest to its key:

        share(t, j) = softmax_j(<norm(k_t), c_j> / sqrt(D)) * exp(<g, norm(k_t)> / sqrt(D) - rate_j * age_t)

    So a slot is an average of what the base itself holds about the text, in the span of the evidence, before anything
    is learned; c starts at real tokens' keys, g at 0. Keys are taken at position 0, where averaging them makes sense.

    Args:
        centroids: (L, H, P, D), keys at position 0.
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
        rate: Tensor,  # (L, H, P) per token, or what broadcasts to it
    ) -> Pooled:
        normed = nn.functional.rms_norm(keys, keys.shape[-1:]) / keys.shape[-1] ** 0.5
        address = torch.einsum("blhcd,lhmd->blhcm", normed, self.centroids).softmax(-1)
        importance = torch.einsum("blhcd,lhd->blhc", normed, self.importance).unsqueeze(-1)
        age = ages_of(mask)[:, None, None, :, None]
        share = address * (importance - rate.unsqueeze(-2) * age).exp() * mask[:, None, None, :, None]
        mass = share.sum(-2)  # (B, L, H, P)
        written = (share / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-2)).transpose(-1, -2)
        return Pooled(written @ keys, written @ values, mass, address, written)
