"""Every touch of a private or fragile API of PEFT and transformers; tests/test_compat.py has a canary for each."""

from .adapters import adapter_tensors, check_adapter_tensors, split_adapter, tell_adapters_by_place
from .attention import AttentionReceived, attention_received
from .caches import PrefixCache, PrefixLayer, keys_values_of
from .families import (
    READ_BY_WEIGHT,
    RECURRENT,
    UNUSED_CLASSIFIER,
    check_carries_nothing,
    check_causal,
    check_supported,
    default_target_modules,
    embedding_scale,
    encoder_window,
    has_longrope,
    has_recurrent_layers,
    is_classifier,
    key_value_shape,
    leave_out_classifier,
    read_by_weight,
    rotations,
    smallest_window,
    window_of,
)
from .hooks import allow_no_layers, carry_cards
from .labels import names_in_use
from .passes import (
    check_double_backward,
    inner_backward,
    lora_enabled,
    math_attention,
    most_on_all_ranks,
    prepare_checkpointing,
)

__all__ = [
    "AttentionReceived",
    "PrefixCache",
    "PrefixLayer",
    "READ_BY_WEIGHT",
    "RECURRENT",
    "UNUSED_CLASSIFIER",
    "adapter_tensors",
    "allow_no_layers",
    "attention_received",
    "carry_cards",
    "check_adapter_tensors",
    "check_carries_nothing",
    "check_causal",
    "check_double_backward",
    "check_supported",
    "default_target_modules",
    "embedding_scale",
    "encoder_window",
    "has_longrope",
    "has_recurrent_layers",
    "inner_backward",
    "is_classifier",
    "key_value_shape",
    "keys_values_of",
    "leave_out_classifier",
    "lora_enabled",
    "math_attention",
    "most_on_all_ranks",
    "names_in_use",
    "prepare_checkpointing",
    "read_by_weight",
    "rotations",
    "smallest_window",
    "split_adapter",
    "tell_adapters_by_place",
    "window_of",
]
