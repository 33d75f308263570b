"""The learned correction of the running average. It sees all slots of the state and starts at zero.

Axes: B tasks, m slots, L layers, H key/value heads, W width of a packed slot.
"""

import torch
from torch import Tensor, nn

from ..tensors import zero_linear

NUM_HEADS = 4
TINY = 1e-20


class Correction(nn.Module):
    """One transformer block over the slots that corrects the state. Its last layer starts at zero.

        theta_hat = theta + rms(theta) * g                  g = block(theta, counts)

    With gradients, the block also sees the normed gradient and gives a rate for every slot:

        theta_hat = theta + rms(theta) * (g - rate * gradient / rms(gradient))
        g, rate   = block(theta, gradient, counts)

    The correction is applied whenever a query reads the state. The stored state stays uncorrected, so errors of the
    correction cannot accumulate. The counts tell the block how reliable the average is: (1 + x)^(-1/2), the rate at
    which a mean converges, with x the weight of each slot (for a kept token its age), the number of chunks and the
    number of tokens. They approach 0, so more chunks than in training are nothing new to the block.

    Args:
        num_layers: L of the packed slots (B, m, L, H, W).
        num_heads: H of the packed slots.
        width: W of the packed slots.
        hidden: width of the block.
        gradients: whether `forward` gets gradients.
    """

    def __init__(
        self, num_layers: int, num_heads: int, width: int, hidden: int = 128, *, gradients: bool = False
    ) -> None:
        super().__init__()
        groups = num_layers * num_heads
        self.read = nn.Linear(groups * (width * (1 + gradients) + 1) + 2, hidden)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention_in, self.attention_out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.write = zero_linear(hidden, groups * width)
        if gradients:
            self.follow = zero_linear(hidden, groups)

    def forward(
        self,
        slots: Tensor,  # (B, m, L, H, W)
        weight: Tensor,  # (B, L, H, m)
        step: Tensor,  # (B,)
        num_tokens: Tensor,  # (B,)
        gradient: Tensor | None = None,  # (B, m, L, H, W)
    ) -> Tensor:  # (B, m, L, H, W)
        """The corrected slots theta_hat.

        Args:
            slots: theta, all slots of the state.
            weight: weight of each slot in the average, or the age of a kept token.
            step: number of chunks read.
            num_tokens: number of tokens read.
            gradient: mean gradient of the chunks' losses with respect to the slots; None if gradients are not used.
        """
        rms = slots.square().mean(-1, keepdim=True).add(1e-6).sqrt()  # (B, m, L, H, 1)
        counts = torch.stack([step, num_tokens], 1).float()[:, None].expand(-1, slots.shape[1], -1)  # (B, m, 2)
        weight = weight.permute(0, 3, 1, 2)  # (B, m, L, H)
        unsure = torch.cat([weight.flatten(2), counts], -1).add(1).rsqrt()
        seen = [slots / rms]
        if gradient is not None:
            # One norm for the whole task keeps the differences between slots, layers and heads: they show where the
            # gradient matters.
            seen.append(gradient * (gradient.square().mean((1, 2, 3, 4), keepdim=True) + TINY).rsqrt())
        x = self.read(torch.cat([*(t.flatten(2) for t in seen), unsure], -1))
        x = x + self._attend(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        correction = self.write(x).view(slots.shape)
        if gradient is not None:
            correction = correction - self.follow(x).view(*slots.shape[:-1], 1) * seen[1]
        # theta(0) is learned itself, so it needs no correction.
        read = (step > 0).view(-1, 1, 1, 1, 1)
        return slots + rms * correction * read

    def _attend(self, x: Tensor) -> Tensor:  # (B, m, hidden)
        query, key, value = self.attention_in(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)  # (B, heads, m, hidden / heads)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))
