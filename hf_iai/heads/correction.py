"""What is learned on top of the average: a correction that sees the whole state and starts at zero.

Axes: B tasks, m slots, L layers, H key/value heads, W width of a packed slot.
"""

import torch
from torch import Tensor, nn

NUM_HEADS = 4
TINY = 1e-20


class Correction(nn.Module):
    """theta_hat = theta + rms(theta) * g(theta, counts), g one transformer block over the slots with a zero last layer.

    Where there are gradients, the block sees them too, normed, and also says how far to follow each slot's:

        theta_hat = theta + rms(theta) * (g - rate * gradient / rms(gradient))
        g, rate   = block(theta, gradient, counts)

    It is applied where the state is read, not where it is kept: the state stays what it is, and errors of the
    correction cannot accumulate. The counts tell it how sure the average is: (1 + x)^(-1/2), the rate at which a mean
    settles, of each slot's weight (a kept token's age), the chunks and the tokens. They fall to 0, so that more chunks
    than training had are nothing new.

    Args:
        num_layers, num_heads, width: of a packed slot, (B, m, L, H, W).
        hidden: width of the block.
        gradients: whether there are gradients.
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
        self.write = nn.Linear(hidden, groups * width)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)
        if gradients:
            self.follow = nn.Linear(hidden, groups)
            nn.init.zeros_(self.follow.weight)
            nn.init.zeros_(self.follow.bias)

    def forward(
        self,
        slots: Tensor,  # (B, m, L, H, W)
        weight: Tensor,  # (B, L, H, m)
        step: Tensor,  # (B,)
        num_tokens: Tensor,  # (B,)
        gradient: Tensor | None = None,  # (B, m, L, H, W)
    ) -> Tensor:  # (B, m, L, H, W)
        rms = slots.square().mean(-1, keepdim=True).add(1e-6).sqrt()  # (B, m, L, H, 1)
        counts = torch.stack([step, num_tokens], 1).float()[:, None].expand(-1, slots.shape[1], -1)  # (B, m, 2)
        weight = weight.permute(0, 3, 1, 2)  # (B, m, L, H)
        unsure = torch.cat([weight.flatten(2), counts], -1).add(1).rsqrt()
        seen = [slots / rms]
        if gradient is not None:
            # Over the whole task: in which slots, layers and heads the gradient is large says where it matters.
            seen.append(gradient * (gradient.square().mean((1, 2, 3, 4), keepdim=True) + TINY).rsqrt())
        x = self.read(torch.cat([*(t.flatten(2) for t in seen), unsure], -1))
        x = x + self._attend(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        correction = self.write(x).view(slots.shape)
        if gradient is not None:
            correction = correction - self.follow(x).view(*slots.shape[:-1], 1) * seen[1]
        # theta(0) is learned itself: nothing corrects it.
        read = (step > 0).view(-1, 1, 1, 1, 1)
        return slots + rms * correction * read

    def _attend(self, x: Tensor) -> Tensor:  # (B, m, hidden)
        query, key, value = self.attention_in(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)  # (B, heads, m, hidden / heads)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))
