"""The learned delta rule: before a token is added to the average, what the state recalls in its place is taken out."""

from torch import Tensor, nn

# Evidence of a chunk, token by token: where each token is written, what each slot's read-out is made of, the values.
WRITES = ("address", "written", "token_value")
TOKENS_AT_ONCE = 256  # all layers and heads of a token at once are large on a large base


class DeltaRule(nn.Module):
    """The average reads v_t - rms(v_t) g(norm(r_t)) instead of v_t, where r_t is what the slots recall at token t:

        r_t = sum_j address(t, j) slot_j        in every layer and head; g sees all of them at once

    A plain average cannot know which of two values of a key is the newer. One layer and head recalls a mixture of all
    that shares its slots, but across them only what was written under the same key agrees: so g, one hidden layer
    whose last one starts at zero, can tell the value that is to be replaced. With g = 0 the state is the plain average;
    its input has unit length, so what it takes out is bounded by its weights. What is replaced was written by earlier
    chunks: tokens of one chunk do not replace each other.

    Args:
        num_layers, num_heads, width: of the values, (B, L, H, C, D).
        hidden: width of the hidden layer.

    Source: the delta rule of fast weights, Schlag et al., arXiv 2102.11174, equation 24; the joint recall is ours.
    """

    def __init__(self, num_layers: int, num_heads: int, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.shape = num_layers, num_heads, width
        size = num_layers * num_heads * width
        self.read, self.write = nn.Linear(size, hidden), nn.Linear(hidden, size)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(
        self,
        slots: Tensor,  # (B, L, H, P, D)
        address: Tensor,  # (B, L, H, C, P), sums to 1 over the slots
        written: Tensor,  # (B, L, H, P, C), sums to 1 over the tokens
        values: Tensor,  # (B, L, H, C, D)
    ) -> Tensor:  # (B, L, H, P, D)
        """What is to be taken out of each slot's read-out."""
        tokens = zip(*(t.split(TOKENS_AT_ONCE, 3) for t in (address, written.transpose(3, 4), values)), strict=True)
        return sum(w.transpose(3, 4) @ self._replaced(slots, a, v) for a, w, v in tokens)

    def _replaced(self, slots: Tensor, address: Tensor, values: Tensor) -> Tensor:  # (B, L, H, C, D)
        """Of each token."""
        recalled = (address @ slots).movedim(3, 1).flatten(2)  # (B, C, L * H * D)
        recalled = nn.functional.rms_norm(recalled, recalled.shape[-1:])
        old = self.write(nn.functional.gelu(self.read(recalled))).unflatten(-1, self.shape).movedim(1, 3)
        return values.square().mean(-1, keepdim=True).add(1e-6).sqrt() * old
