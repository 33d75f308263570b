"""A chunk's own keys and values, pooled into slots."""

import torch
from torch import Tensor, nn

MIN_MASS = 1e-4  # keeps a slot that no token chose well defined


class TokenPooling(nn.Module):
    """Every token gives its keys and values to the slots, most to the slot whose centroid its key is nearest to:

        share(t, j) = softmax_j(<norm(k_t), c_j> / sqrt(D)) * exp(<g, norm(k_t)> / sqrt(D) - rate_j * age_t)
        slot_j      = sum_t share(t, j) (k_t, v_t) / mass_j          mass_j = sum_t share(t, j)

    So a slot is an average of what the base itself holds about the text, in the span of the evidence, before anything
    is learned; c starts at m real tokens' keys, g at 0. Keys are taken at position 0, where averaging them makes sense.

    Args:
        centroids: (L, H, m, D), keys at position 0.
    """

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        self.centroids = nn.Parameter(nn.functional.rms_norm(centroids, centroids.shape[-1:]).clone())
        self.importance = nn.Parameter(torch.zeros_like(centroids[:, :, 0]))  # (L, H, D)

    def forward(
        self,
        keys: Tensor,  # (B, L, H, C, D) at position 0
        values: Tensor,  # (B, L, H, C, D)
        mask: Tensor,  # (B, C)
        rate: Tensor,  # (L, H, m) per token
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B, L, H, m, D) twice, mass (B, L, H, m)
        normed = nn.functional.rms_norm(keys, keys.shape[-1:]) / keys.shape[-1] ** 0.5
        share = torch.einsum("blhcd,lhmd->blhcm", normed, self.centroids).softmax(-1)
        importance = torch.einsum("blhcd,lhd->blhc", normed, self.importance)
        age = mask.flip(1).cumsum(1).flip(1) - 1  # (B, C) real tokens after this one
        discount = (importance.unsqueeze(-1) - rate.unsqueeze(-2) * age[:, None, None, :, None]).exp()
        share = share * discount * mask[:, None, None, :, None]  # (B, L, H, C, m)
        mass = share.sum(-2).clamp_min(MIN_MASS)  # (B, L, H, m)
        share = (share / mass.unsqueeze(-2)).transpose(-1, -2)  # (B, L, H, m, C)
        return share @ keys, share @ values, mass
