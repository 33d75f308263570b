"""Every touch of a private or fragile API of PEFT and transformers; tests/test_compat.py has a canary for each."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps

import torch
from peft import PeftModel
from peft.peft_model import TunerModelStatus
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .low_rank import active_updates, low_rank_updates


class PrefixLayer(CacheLayerMixin):
    """A read-only key/value prefix: `update` returns prefix + new and keeps nothing but the last `record` new ones.

    Reading changes nothing, so one prefix serves many passes in one graph and the recomputation of checkpointing.
    """

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, record: int, sliding: bool) -> None:  # (B, H, m, D) each
        super().__init__()
        self.keys, self.values, self.is_sliding = keys, values, sliding
        self.is_initialized = True
        self.record, self.recorded = record, None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

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


class PrefixCache(Cache):
    """One `PrefixLayer` per layer.

    Args:
        config: the base model's configuration.
        keys_values: per layer keys and values, (B, H, m, D) each; m may be 0.
        record: how many of the last new positions to keep for `recorded`.
    """

    def __init__(self, config, keys_values: list[tuple[Tensor, Tensor]], record: int = 0) -> None:
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(keys_values)
        layers = [
            PrefixLayer(k, v, record, kind == "sliding_attention")
            for (k, v), kind in zip(keys_values, kinds, strict=True)
        ]
        super().__init__(layers=layers)

    def recorded(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the keys and values (B, H, record, D) of the last pass's last positions."""
        return [layer.recorded for layer in self.layers]


# Padding on the left changes nothing, and generate takes embeddings: measured in tests/test_families.py.
RECURRENT = (
    "mamba falcon_mamba mamba2 jamba granitemoehybrid lfm2 lfm2_moe qwen3_next qwen3_5_text olmo_hybrid"
).split()


def has_recurrent_layers(config) -> bool:
    """Whether any layer is not attention, so that there are no keys and values of it.

    Raises:
        ValueError: for a family with such layers that is not among those tested.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds <= {"full_attention", "sliding_attention"} and hasattr(config, "num_attention_heads"):
        return False
    if config.model_type not in RECURRENT:
        raise ValueError(
            f"{config.model_type!r} has layers that are not attention (of {sorted(kinds)}) and is not among those "
            f"known to work: use one with attention in every layer, or one of {RECURRENT}"
        )
    return True


def key_value_shape(config) -> tuple[int, int, int]:
    """(number of layers, key/value heads, head width) of a decoder whose layers are all attention, and alike."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        heads = 1  # its newer architecture repeats its key/value heads before it stores them
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, width


def has_longrope(config) -> bool:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope"


def window_of(config) -> int:
    """The most positions of a pass within which keys of one pass are those of another.

    Longrope turns all keys differently in a text of more than its original length. Dynamic NTK does so beyond
    `max_position_embeddings` only. A base without positions, such as Mamba, has no limit.
    """
    if has_longrope(config):
        return config.rope_parameters["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", sys.maxsize)


def encoder_window(config) -> int:
    """The most tokens of a text; RoBERTa numbers positions from the padding id on, so that it has fewer than rows."""
    numbered = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return window_of(config) - (config.pad_token_id + 1 if numbered else 0)


def is_classifier(model: nn.Module) -> bool:
    """Whether this is an `AutoModelForSequenceClassification`: an encoder below a head of its own."""
    return type(model).__name__.endswith("ForSequenceClassification")


# PEFT trains and saves what `modules_to_save` names; this names nothing.
UNUSED_CLASSIFIER = "unused_classifier_of_the_base"


def leave_out_classifier(config) -> None:
    """Undo what PEFT has just asked for of every sequence classifier: to train the base's own head, and to save it."""
    config.modules_to_save = [UNUSED_CLASSIFIER]


def embedding_scale(model: nn.Module) -> Tensor | float:
    """What a family's token embeddings are multiplied by when ids are looked up, such as Gemma's."""
    return getattr(model.get_input_embeddings(), "embed_scale", 1.0)


def rotations(model: nn.Module, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin of unit length for every layer, (B, L, 1, T, R) each with L = 1 where all layers are alike.

    None for absolute positions. Rotations that depend on the length of the text do not change within `window_of`.
    """
    rotary, config = getattr(model.base_model, "rotary_emb", None), model.config
    if rotary is None:
        return None
    per_kind = rotary.rope_type if isinstance(rotary.rope_type, dict) else None  # Gemma3: one for each kind of layer
    if per_kind:
        scale = {kind: getattr(rotary, f"{kind}_attention_scaling") for kind in per_kind}
        turns = {kind: [t / scale[kind] for t in rotary(like, positions, kind)] for kind in per_kind}
        layers = [turns[kind] for kind in config.layer_types]
    else:
        layers = [[t / rotary.attention_scaling for t in rotary(like, positions)]]
    if not all(flags := getattr(config, "no_rope_layers", None) or [1]):
        still = [torch.ones_like(layers[0][0]), torch.zeros_like(layers[0][1])]
        layers = [layers[0] if flag else still for flag in flags]
    cos, sin = (torch.stack(t, 1).unsqueeze(2) for t in zip(*layers, strict=True))
    return cos, sin


READ_BY_WEIGHT = ("conv1d", "x_proj", "dt_proj", "out_proj")


def read_by_weight(model: nn.Module) -> set[str]:
    """`parent.name` of the layers of Mamba's mixers whose weights fused kernels read: LoRA on them would not be seen.

    Without these kernels some of them are called; what an adapter means must not depend on what is installed.
    """
    mixers = [n for n, m in model.named_modules() if {"A_log", "D"} <= dict(m.named_parameters(recurse=False)).keys()]
    return {f"{parent}.{name}" for parent in {n.split(".")[-1] for n in mixers} for name in READ_BY_WEIGHT}


def default_target_modules(config) -> str | list[str]:
    """What PEFT itself adapts by LoRA in a family; all linear modules of one that it does not know."""
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type, "all-linear")


def check_supported(model: nn.Module) -> None:
    """Refuse what would be read wrongly without a word.

    Raises:
        ValueError: for rotations of interleaved pairs, unnamed layers without positions, or flash attention.
    """
    config = model.config
    if config.model_type.startswith(("cohere", "glm", "helium", "ernie4_5", "llama4")):
        raise ValueError(f"{config.model_type!r} rotates interleaved pairs: not available yet")
    if config.model_type.startswith("exaone4"):
        raise ValueError(f"{config.model_type!r} has unnamed layers without positions: not available yet")
    if "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"attention {config._attn_implementation!r} takes the read-out slots' positions for packed sequences: "
            "load the base with attn_implementation='sdpa'"
        )


@contextmanager
def lora_enabled(modules: list[LoraLayer], enabled: bool) -> Iterator[None]:
    """LoRA on or off for the passes inside. PEFT's own switch would also flip `requires_grad`."""
    before = [module._disable_adapters for module in modules]
    for module in modules:
        module._disable_adapters = not enabled
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module._disable_adapters = value


_in_math_attention: ContextVar[bool] = ContextVar("math_attention", default=False)


@contextmanager
def math_attention(enabled: bool) -> Iterator[None]:
    """Attention in plain operations, for the passes inside: its fused kernels cannot be differentiated twice."""
    token = _in_math_attention.set(enabled)
    with ExitStack() as stack:
        if enabled:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            yield
        finally:
            _in_math_attention.reset(token)


def check_double_backward(model: nn.Module) -> None:
    """Refuse what fails, or crashes, where a gradient is differentiated again.

    Raises:
        ValueError: for other attention than `"eager"` and `"sdpa"`, or a model that FSDP shards.
    """
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa", None):
        raise ValueError(
            f"second_order=True differentiates attention twice, which {attention!r} cannot: load the base with "
            "attn_implementation='sdpa', or set second_order=False"
        )
    if _sharding(model):
        raise ValueError("second_order=True cannot be sharded by FSDP: train with DDP, or set second_order=False")


@contextmanager
def inner_backward(model: nn.Module) -> Iterator[None]:
    """For a backward pass within the forward pass: FSDP is not to reduce gradients and free weights after it."""
    if not (shards := _sharding(model)):
        yield
        return
    context = shards[0]._get_fsdp_state()._state_ctx  # of all that is sharded, modules around the base included
    groups = [group for state in context.all_states for group in state._fsdp_param_groups]
    names = ("reshard_after_backward", "reduce_grads", "all_reduce_grads")
    before = [[getattr(group, name) for name in names] for group in groups]
    last, context.is_last_backward = context.is_last_backward, False
    for group in groups:
        for name in names:
            setattr(group, name, False)
    try:
        yield
    finally:
        context.is_last_backward = last
        for group, values in zip(groups, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(group, name, value)


def _sharding(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP shards.

    Raises:
        ValueError: for FSDP of version 1, which has no such switches.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("gradients cannot be taken within FSDP version 1: set fsdp_version to 2, or train with DDP")
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def prepare_checkpointing(model: nn.Module) -> None:
    """Make gradient checkpointing keep our cache, and recompute each layer as it was in the forward pass.

    Raises:
        ValueError: for reentrant checkpointing, which would cut the read-outs out of the graph.
    """
    for layer in model.modules():
        if not getattr(layer, "gradient_checkpointing", False):
            continue
        if not isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False  # a stack (GPT-2's) that would drop the cache; its layers keep theirs
            continue
        layer._can_checkpoint_with_cache = True
        function = layer._gradient_checkpointing_func
        if not isinstance(function, _CheckpointAsNow):
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise ValueError("gradient checkpointing with use_reentrant=True: pass use_reentrant=False")
            layer._gradient_checkpointing_func = _CheckpointAsNow(function, layer)


class _CheckpointAsNow:
    """Recomputation runs in the backward pass, outside of the contexts of the forward pass: this enters them again."""

    def __init__(self, checkpoint: Callable, layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.lora = [module for module in layer.modules() if isinstance(module, LoraLayer)]

    def __call__(self, forward: Callable, *args):
        enabled = bool(self.lora) and not self.lora[0]._disable_adapters
        updates, in_math = active_updates(), _in_math_attention.get()

        def forward_as_now(*args):
            with lora_enabled(self.lora, enabled), low_rank_updates(updates), math_attention(in_math):
                return forward(*args)

        return self.checkpoint(forward_as_now, *args)


def carry_cards(method: str, update: Callable[[PeftModel, str, str], None]) -> None:
    """Call `update(model, folder, name)` once a card lies in the folder that an adapter of `method` is saved in.

    Saving, PEFT writes the card; pushing, transformers then puts one of its own in that place, just before the upload.
    """
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @wraps(create)
    def create_and_update(self, output_dir: str) -> None:
        create(self, output_dir)
        if self.peft_type == method:
            update(self, output_dir, os.path.basename(os.path.abspath(output_dir)))

    @wraps(upload)
    def update_and_upload(self, working_dir: str, repo_id: str, *args, **kwargs):
        if self.peft_type == method:
            update(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_and_update
    PeftModel._upload_modified_files = update_and_upload


def allow_no_layers(method: str) -> None:
    """PEFT asks an adapter's layers whether they are enabled before it disables them; `method` may have none."""
    status = PeftModel.get_model_status

    @wraps(status)
    def status_without_layers(self) -> TunerModelStatus:
        if self.peft_type != method or any(isinstance(m, LoraLayer) for m in self.base_model.modules()):
            return status(self)
        trainable, total = self.get_nb_trainable_parameters()
        return TunerModelStatus(
            base_model_type=type(self.get_base_model()).__name__,
            adapter_model_type=type(self.base_model).__name__,
            peft_types={name: method for name in self.peft_config},
            trainable_params=trainable,
            total_params=total,
            num_adapter_layers=0,
            enabled=not self.base_model._disabled,
            active_adapters=self.active_adapters,
            merged_adapters=[],
            requires_grad={},
            available_adapters=sorted(self.peft_config),
            devices={},
            quantization_backend=None,
        )

    PeftModel.get_model_status = status_without_layers
