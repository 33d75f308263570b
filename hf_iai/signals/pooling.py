"""A chunk's own keys and values, pooled into slots."""

import torch
from torch import Tensor, nn

from ..base import ages_of


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
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B, L, H, P, D) twice, mass (B, L, H, P)
        age = ages_of(mask)
        share = self._clustered(keys, age, rate) * mask[:, None, None, :, None]  # (B, L, H, C, P)
        mass = share.sum(-2)  # (B, L, H, P)
        share = share / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-2)
        share = share.transpose(-1, -2)  # (B, L, H, P, C)
        return share @ keys, share @ values, mass

    def _clustered(self, keys: Tensor, age: Tensor, rate: Tensor) -> Tensor:  # (B, L, H, C, P)
        normed = nn.functional.rms_norm(keys, keys.shape[-1:]) / keys.shape[-1] ** 0.5
        share = torch.einsum("blhcd,lhmd->blhcm", normed, self.centroids).softmax(-1)
        importance = torch.einsum("blhcd,lhd->blhc", normed, self.importance)
        return share * (importance.unsqueeze(-1) - rate.unsqueeze(-2) * age[:, None, None, :, None]).exp()
