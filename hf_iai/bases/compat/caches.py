"""A key/value prefix as a cache of transformers."""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class PrefixLayer(CacheLayerMixin):
    """A cache layer that holds a read-only key/value prefix.

    `update` returns the prefix and the new keys and values. Of the new ones it only remembers the last `record`.
    Reading does not change the prefix, so one prefix can serve many passes in one graph, and checkpointing can
    recompute them.

    Args:
        keys: (B, H, m, D).
        values: (B, H, m, D).
        record: how many of the last new positions to remember.
        sliding: whether the layer has a sliding window.
    """

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, record: int, sliding: bool) -> None:  # (B, H, m, D) each
        super().__init__()
        self.keys, self.values, self.is_sliding = keys, values, sliding
        self.is_initialized = True
        self.record, self.recorded = record, None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do, since the prefix is given from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.record:
            self.recorded = key_states[..., -self.record :, :], value_states[..., -self.record :, :]
        return (
            torch.cat([self.keys.to(key_states.dtype), key_states], -2),
            torch.cat([self.values.to(value_states.dtype), value_states], -2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2] + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]

    def get_max_length(self) -> int:
        return -1


def keys_values_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of a cache, (B, H, T, D) each.

    Raises:
        ValueError: if the cache is empty, or its layers hold different numbers of tokens.
    """
    layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if not layers or any(not isinstance(t, Tensor) or t.dim() != 4 for pair in layers for t in pair):
        raise ValueError(
            f"{type(cache).__name__} holds no keys and values in some layer: pass the cache of a forward pass"
        )
    if len(lengths := {keys.shape[-2] for keys, _ in layers}) > 1:
        raise ValueError(
            f"layers of the cache hold {sorted(lengths)} tokens: sliding-window layers forget, so read the text instead"
        )
    return layers


class PrefixCache(Cache):
    """A cache with one `PrefixLayer` per layer of the model.

    Args:
        config: the base model's configuration.
        keys_values: keys and values of every layer, (B, H, m, D) each; m may be 0.
        record: how many of the last new positions to remember for `recorded`.
    """

    def __init__(self, config, keys_values: list[tuple[Tensor, Tensor]], record: int = 0) -> None:
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(keys_values)
        layers = [
            PrefixLayer(k, v, record, kind == "sliding_attention")
            for (k, v), kind in zip(keys_values, kinds, strict=True)
        ]
        super().__init__(layers=layers)

    def recorded(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, record, D) of the last positions of the last pass, for every layer."""
        return [layer.recorded for layer in self.layers]
