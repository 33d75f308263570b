"""Attention weights of a pass, whichever attention function a model calls.

Axes: B rows, H key/value heads, G query heads, T tokens of the text, S places that they attend to, D head width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SOFTMAX = {nn.functional.softmax, torch.softmax, Tensor.softmax}
EVERY = 4  # every fourth token is asked what it attends to: nearly the same choice of slots at a quarter of the cost


def attention_received(attentions: Sequence[Tensor], num_heads: int) -> Tensor:  # L of (B, G, T, S) -> (B, L, H, S)
    """What `AttentionReceived` would have recorded of a pass without padding, from its `output_attentions`."""
    return (
        torch.stack([t[:, :, EVERY - 1 :: EVERY].float().sum(2) * EVERY for t in attentions], 1)
        .unflatten(2, (num_heads, -1))
        .mean(3)
    )


class AttentionReceived(TorchFunctionMode):
    """A context in which each layer's attention is recorded: how much every place receives from the tokens of a text.

    It sees the calls of `scaled_dot_product_attention`, and of `softmax` for eager attention, in this thread only.
    Results of the pass do not change, and no gradient flows through what is recorded.

    Args:
        mask: 1 for the text's real tokens, 0 for padding, (B, T).
        num_heads: H.

    Attributes:
        layers: what was recorded, (B, H, S) for each layer: the sum over the text's tokens, estimated from every fourth
            one, of the attention weights, averaged over the query heads that share a key/value head.
    """

    def __init__(self, mask: Tensor, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.length, self.layers = num_heads, mask.shape[1], []
        sampled = (mask != 0) & ((mask.cumsum(1) - 1) % EVERY == EVERY - 1)  # (B, T)
        # Which tokens are asked depends on their number in the text alone, so padding changes nothing.
        self.asked = sampled.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(sampled.sum(1).max()))]
        self.weight = sampled.gather(1, self.asked)[:, None, :, None] * EVERY  # (B, 1, T', 1)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            self._record(self._weights(*args, **kwargs))
        elif func in SOFTMAX and result.dim() == 4 and result.shape[-2] == self.length:
            self._record(self._asked(result.detach()))
        return result

    def check_complete(self, num_layers: int, attention: str) -> Tensor:  # (B, L, H, S)
        """All layers together.

        Raises:
            ValueError: if not every layer was seen, as with kernels that keep their weights to themselves.
        """
        if len(self.layers) != num_layers:
            raise ValueError(
                f"slots saw the attention of {len(self.layers)} of {num_layers} layers, with "
                f"attn_implementation={attention!r}: load the base with 'sdpa' or 'eager', or use accumulation='recent'"
            )
        return torch.stack(self.layers, 1)

    def _record(self, weights: Tensor) -> None:  # (B, G, T', S)
        # A token of padding may see nothing, and then its weights are NaN.
        received = (weights.masked_fill(self.weight == 0, 0) * self.weight).sum(2)  # (B, G, S)
        self.layers.append(received.unflatten(1, (self.num_heads, -1)).mean(2).float())

    def _asked(self, rows: Tensor) -> Tensor:  # (B, G, T, n) -> (B, G, T', n)
        return rows.take_along_dim(self.asked[:, None, :, None], 2)

    @torch.no_grad()
    def _weights(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The attention weights of the tokens that are asked, (B, G, T', S)."""
        num_places, scale = key.shape[-2], kwargs.get("scale") or query.shape[-1] ** -0.5
        asked = self._asked(query.detach()).float()
        groups = asked.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, H', G / H' * T', D)
        scores = (groups @ key.detach().float().mT * scale).view(*asked.shape[:3], num_places)
        if attn_mask is None:  # then attention is causal, and the text stands at the end
            places = torch.arange(num_places, device=key.device)
            seen = places <= self.asked[..., None] + num_places - self.length  # (B, T', S)
            return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        attn_mask = attn_mask.expand(len(asked), -1, -1, -1).take_along_dim(self.asked[:, None, :, None], 2)
        if attn_mask.dtype == torch.bool:
            return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1)
        return (scores + attn_mask.float()).softmax(-1)
