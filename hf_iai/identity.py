"""The fingerprint that ties a state to the base and adapter that made it."""

import hashlib
import json
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .bases.base import Base
from .config import IAIConfig
from .embedded import EMBEDDED_NAME, is_embedded_base
from .registry import decisive_fields
from .state import Identity
from .tasks import task_of

SAMPLED_TENSORS, SAMPLED_VALUES = 16, 64
# Fields that change the meaning of any state, unlike paths, names and training switches. Parts add their own fields.
COMMON_FIELDS = (
    "regime state_type signal num_state_tokens accumulation num_kept_tokens correction pin_bos r lora_alpha "
    "use_rslora rank_pattern alpha_pattern layers_to_transform fan_in_fan_out bias"
).split()


def fingerprint(base: Base, config: IAIConfig, adapter: Iterable[tuple[str, Tensor]]) -> Identity:
    """Hash the base's architecture, a sample of its weights, and the adapter's weights and configuration.

    Args:
        base: the pretrained model.
        config: the adapter's configuration.
        adapter: names and values of the adapter's weights.
    """
    digest = hashlib.sha256()
    task = task_of(config)
    fields = {*COMMON_FIELDS, *decisive_fields(config, task.parts(config))}
    base_model = base.model
    described = {name: getattr(config, name) for name in fields} | _architecture(base_model)
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    weights = sorted(
        (n.replace(".base_layer.", "."), p)
        for n, p in base_model.named_parameters()
        # Some kernels rearrange quantized weights at their first use, so only floating weights are sampled.
        if "lora_" not in n and p.is_floating_point() and base.reads(n)
    )
    for name, tensor in weights[:: max(1, len(weights) // SAMPLED_TENSORS)]:
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED_VALUES)][:SAMPLED_VALUES]
        # Compared in bfloat16, a checkpoint is the same base whether it was loaded in bfloat16 or in float32.
        _update(digest, name, sample.to(torch.bfloat16))
    for name, tensor in sorted(adapter):
        _update(digest, name, tensor.detach())
    return Identity(digest.hexdigest(), f"{_base_name(base_model)} + {task.display_name()} ({digest.hexdigest()[:8]})")


def _architecture(base_model: nn.Module) -> dict:
    config = base_model.config
    num_heads = getattr(config, "num_attention_heads", None)  # Mamba has none
    shape = (config.hidden_size, config.num_hidden_layers, num_heads, config.vocab_size)
    described = {"class": type(base_model).__name__, "model_type": config.model_type, "shape": shape}
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        described["quantization"] = quantization.to_dict()
    return described


def _base_name(base_model: nn.Module) -> str:
    path = base_model.config._name_or_path
    return EMBEDDED_NAME if is_embedded_base(path) else os.path.basename(path.rstrip("/")) or type(base_model).__name__


def _update(digest, name: str, tensor: Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
