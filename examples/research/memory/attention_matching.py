"""Attention matching: a cache compacted to m slots with fitted values and biases (2602.16284), for Llama-like bases.

Our port of the formulas, for each key/value head. Of queries Q and places K, V with biases b:

    S = Q K' / sqrt(D) + b,  e = exp(S - max of its row),  Z = sum of e over places
    kept:    the m places of largest root-mean-square softmax(S)
    beta  =  b of the kept + log argmin_B |M B - Z|^2,  e^-3 <= B <= e^3,  M = e at the kept places
    values = argmin_X |softmax(Q C' / sqrt(D) + beta) X - softmax(S) V|^2,  C the kept keys

Q are the queries of the chunk read once more, behind itself: "repeat queries". Keys stay at their positions, so a text
must fit the window.

Axes: H key/value heads, g query heads of each, T tokens, S places, m slots, D head width, Q = g * T queries.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "attention_matching"
LIMIT, STEPS, RIDGE = 3.0, 100, 1e-3  # of log B; of the projected gradient; of the values, beside a mean diagonal of 1


@dataclass
class Layer:
    """What a layer keeps, and what its last pass saw."""

    keys: Tensor  # (H, m, D)
    values: Tensor  # (H, m, D)
    bias: Tensor  # (H, m)
    seen: tuple[Tensor, Tensor, Tensor] | None = None  # queries (H, g, T, D), keys and values (H, T, D)


@dataclass
class Slots:
    """The attention function of a base, which attends to the slots of each layer before the text."""

    num: int
    layers: list[Layer] = field(default_factory=list)

    def __call__(self, module, query, key, value, mask, scaling=None, **kwargs) -> tuple[Tensor, None]:
        layer, length = self.layers[module.layer_idx], query.shape[2]
        layer.seen = query[0].unflatten(0, (key.shape[1], -1)), key[0], value[0]
        keys, values = torch.cat([layer.keys, key[0]], 1), torch.cat([layer.values, value[0]], 1)
        causal = torch.ones(length, length, dtype=torch.bool).tril().logical_not() * -1e9  # (T, T)
        bias = torch.cat([layer.bias[:, None].expand(-1, length, -1), causal.expand(len(keys), -1, -1)], 2)
        groups = query.shape[1] // key.shape[1]
        keys, values, bias = (t.repeat_interleave(groups, 0)[None] for t in (keys, values, bias))
        return scaled_dot_product_attention(query, keys, values, bias, scale=scaling).transpose(1, 2), None

    def start(self, base) -> None:
        """No slots yet."""
        config = base.config
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        empty = torch.zeros(heads, 0, width)
        self.layers = [Layer(empty, empty, torch.zeros(heads, 0)) for _ in range(config.num_hidden_layers)]

    def extend(self) -> None:
        """Keep all of the text of the last pass."""
        for layer in self.layers:
            _, keys, values = layer.seen
            layer.keys, layer.values = torch.cat([layer.keys, keys], 1), torch.cat([layer.values, values], 1)
            layer.bias = torch.cat([layer.bias, torch.zeros(keys.shape[:2])], 1)

    def compact(self) -> None:
        """Keep at most m places, as the queries of the last pass ask."""
        for layer in self.layers:
            queries = layer.seen[0].flatten(1, 2)  # (H, Q, D)
            layer.keys, layer.values, layer.bias = compacted(queries, layer.keys, layer.values, layer.bias, self.num)


def compacted(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The m best places, their fitted values and biases: (H, Q, D), (H, S, D), (H, S, D), (H, S) -> m in place of S."""
    if keys.shape[1] <= num:
        return keys, values, bias
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5 + bias[:, None]  # (H, Q, S)
    weights = scores.softmax(-1)
    kept = weights.square().mean(1).topk(num, 1).indices.sort(1).values  # (H, m)
    exponents = (scores - scores.amax(-1, keepdim=True)).exp()
    mass = _bounded_least_squares(exponents.take_along_dim(kept[:, None], 2), exponents.sum(-1))
    found = bias.gather(1, kept) + mass.log()
    keys = keys.take_along_dim(kept[..., None], 1)
    weights_kept = (scores.take_along_dim(kept[:, None], 2) + mass.log()[:, None]).softmax(-1)
    return keys, _fitted(weights_kept, weights @ values, values.take_along_dim(kept[..., None], 1)), found


def _bounded_least_squares(matrix: Tensor, target: Tensor) -> Tensor:  # (H, Q, m), (H, Q) -> (H, m)
    """By accelerated projected gradient, from B = 1."""
    gram, towards = matrix.mT @ matrix, (matrix.mT @ target[..., None])[..., 0]
    rate = 1 / gram.sum(-1).amax(-1, keepdim=True)  # no eigenvalue is above the largest sum of a row
    found = ahead = torch.ones_like(towards)
    for step in range(STEPS):
        gradient = (gram @ ahead[..., None])[..., 0] - towards
        before, found = found, (ahead - rate * gradient).clamp(torch.e**-LIMIT, torch.e**LIMIT)
        ahead = found + step / (step + 3) * (found - before)
    return found


def _fitted(weights: Tensor, target: Tensor, start: Tensor) -> Tensor:  # (H, Q, m), (H, Q, D), (H, m, D) -> (H, m, D)
    """Least squares with a ridge towards `start`, the values as they were: places that no query sees keep theirs."""
    gram = weights.mT @ weights
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(gram.shape[-1])
    rest = weights.mT @ (target - weights @ start)
    return start + torch.linalg.solve(gram + ridge, rest)


def attention_matching(base, num_slots: int):
    """A method of `methods`: the base reads each chunk behind m compacted slots, of which one is a beginning token."""
    slots = Slots(num_slots)
    AttentionInterface.register(NAME, slots)
    base.set_attn_implementation(NAME)
    begin = base.config.bos_token_id or 0

    def passed(ids: Tensor, first: int) -> Tensor:
        positions = torch.arange(first, first + ids.shape[1])[None]
        return base.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state

    @torch.no_grad()
    def read(ids: Tensor, size: int) -> list[float]:
        slots.start(base)
        passed(ids.new_full((1, 1), begin), 0)
        slots.extend()
        losses = []
        for number, chunk in enumerate(ids.split(size, 1)):
            hidden = passed(chunk, 1 + number * size)
            logits = base.get_output_embeddings()(hidden[0, :-1]).float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, chunk[0, 1:])))
            slots.extend()
            passed(chunk, 1 + (number + 1) * size)
            slots.compact()
        return losses

    return read
