"""The learned delta rule: subtract what the state already recalls for a token before the token is added to it."""

from torch import Tensor, nn

from ..tensors import zero_linear

# Evidence of a chunk for every token: the slots it is written to, its share of each slot's read-out, its value.
WRITES = ("address", "written", "token_value")
TOKENS_AT_ONCE = 256  # bounds the memory: on a large base, all layers and heads of a token are large


class DeltaRule(nn.Module):
    """Replaces old values: the average gets v_t - rms(v_t) g(norm(r_t)) instead of the value v_t of token t.

        r_t = sum_j address(t, j) slot_j        what the slots recall for token t, in every layer and head

    A plain average cannot tell which of two values of a key is newer. In a single layer and head, r_t is a mixture of
    everything in the same slots. Over all layers and heads, only values that were written under the same key agree. g
    is a network with one hidden layer that sees all of them at once, so it can recognise the value to replace. Its last
    layer starts at zero, and with g = 0 the state is the plain average. Its input is normed, so its weights bound what
    it subtracts. Tokens replace only what earlier chunks have written, not other tokens of their own chunk.

    Args:
        num_layers: L of the values (B, L, H, C, D).
        num_heads: H of the values.
        width: D of the values.
        hidden: width of the hidden layer of g.

    Source: the delta rule of fast weights, Schlag et al., arXiv 2102.11174, equation 24. Recalling over all layers and
    heads at once is ours.
    """

    def __init__(self, num_layers: int, num_heads: int, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.shape = num_layers, num_heads, width
        size = num_layers * num_heads * width
        self.read, self.write = nn.Linear(size, hidden), zero_linear(hidden, size)

    def forward(
        self,
        slots: Tensor,  # (B, L, H, P, D)
        address: Tensor,  # (B, L, H, C, P), sums to 1 over the slots
        written: Tensor,  # (B, L, H, P, C), sums to 1 over the tokens
        values: Tensor,  # (B, L, H, C, D)
    ) -> Tensor:  # (B, L, H, P, D)
        """What to subtract from the read-out of each slot."""
        tokens = zip(*(t.split(TOKENS_AT_ONCE, 3) for t in (address, written.transpose(3, 4), values)), strict=True)
        return sum(w.transpose(3, 4) @ self._replaced(slots, a, v) for a, w, v in tokens)

    def _replaced(self, slots: Tensor, address: Tensor, values: Tensor) -> Tensor:  # (B, L, H, C, D)
        """What to subtract from the value of each token."""
        recalled = (address @ slots).movedim(3, 1).flatten(2)  # (B, C, L * H * D)
        recalled = nn.functional.rms_norm(recalled, recalled.shape[-1:])
        old = self.write(nn.functional.gelu(self.read(recalled))).unflatten(-1, self.shape).movedim(1, 3)
        return values.square().mean(-1, keepdim=True).add(1e-6).sqrt() * old
