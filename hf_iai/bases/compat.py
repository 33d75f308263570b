"""All uses of private or fragile APIs of PEFT and transformers. tests/test_compat.py has a canary test for each."""

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


# In these families padding on the left changes no result, and generate takes embeddings. tests/test_families.py checks
# both.
RECURRENT = (
    "mamba falcon_mamba mamba2 jamba granitemoehybrid lfm2 lfm2_moe qwen3_next qwen3_5_text olmo_hybrid"
).split()


def has_recurrent_layers(config) -> bool:
    """Whether the model has layers other than attention, which keep no keys and values.

    Raises:
        ValueError: if it has such layers and its family was not tested.
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
    """(number of layers, key/value heads, head width) of a decoder in which all layers are equal attention layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        heads = 1  # Falcon's newer architecture repeats its key/value heads before it stores them
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, width


def has_longrope(config) -> bool:
    """Whether rotary embeddings change once a text is longer than the model's original window (longrope)."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope"


def window_of(config) -> int:
    """The largest number of positions up to which the keys of one pass are valid in any other pass.

    Longrope rotates all keys differently if a text is longer than the original length. Dynamic NTK does so only beyond
    `max_position_embeddings`. A base without positions, such as Mamba, has no limit.
    """
    if has_longrope(config):
        return config.rope_parameters["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", sys.maxsize)


def encoder_window(config) -> int:
    """The largest number of tokens in a text of an encoder.

    RoBERTa and its relatives number positions from the padding id on. They have that many fewer than rows in their
    table.
    """
    numbered = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return window_of(config) - (config.pad_token_id + 1 if numbered else 0)


def is_classifier(model: nn.Module) -> bool:
    """Whether this is an `AutoModelForSequenceClassification`, an encoder with a classification head."""
    return type(model).__name__.endswith("ForSequenceClassification")


# PEFT trains and saves the modules that `modules_to_save` names. No module has this name.
UNUSED_CLASSIFIER = "unused_classifier_of_the_base"


def leave_out_classifier(config) -> None:
    """Keep PEFT from training and saving the base's own head, as it does by default for sequence classifiers."""
    config.modules_to_save = [UNUSED_CLASSIFIER]


def embedding_scale(model: nn.Module) -> Tensor | float:
    """The factor that some families, such as Gemma, apply to token embeddings when they look ids up."""
    return getattr(model.get_input_embeddings(), "embed_scale", 1.0)


def rotations(model: nn.Module, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin of the rotary embedding with unit scale, for every layer.

    Some rotations depend on the length of the text. They do not change within `window_of`.

    Args:
        model: the base.
        like: a tensor with the device and type of the result.
        positions: by how many positions to rotate, (B, T).

    Returns:
        cos and sin, (B, L, 1, T, R) each, with L = 1 if all layers are equal; None if the base has absolute positions.
    """
    rotary, config = getattr(model.base_model, "rotary_emb", None), model.config
    if rotary is None:
        return None
    per_kind = rotary.rope_type if isinstance(rotary.rope_type, dict) else None  # Gemma3 has one per kind of layer
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
    """`parent.name` of the layers in Mamba's mixers whose weights fused kernels use directly.

    LoRA on these layers would have no effect. Without the kernels some of the layers are called as usual, but the
    meaning of an adapter must not depend on which kernels are installed.
    """
    mixers = [n for n, m in model.named_modules() if {"A_log", "D"} <= dict(m.named_parameters(recurse=False)).keys()]
    return {f"{parent}.{name}" for parent in {n.split(".")[-1] for n in mixers} for name in READ_BY_WEIGHT}


def default_target_modules(config) -> str | list[str]:
    """The modules that PEFT adapts by default in a family; all linear modules if PEFT does not know the family."""
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type, "all-linear")


def check_supported(model: nn.Module) -> None:
    """Refuse bases that would silently be read wrongly.

    Raises:
        ValueError: for rotary embeddings of interleaved pairs, layers without positions that the configuration does not
            name, or flash attention.
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
    """A context in which LoRA is on or off. PEFT's own switch would also change `requires_grad`.

    Args:
        modules: the LoRA layers.
        enabled: whether they apply LoRA inside the context.
    """
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
    """A context in which attention uses plain operations, because fused kernels cannot be differentiated twice."""
    token = _in_math_attention.set(enabled)
    with ExitStack() as stack:
        if enabled:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            yield
        finally:
            _in_math_attention.reset(token)


def check_double_backward(model: nn.Module) -> None:
    """Refuse models whose gradients cannot be differentiated again.

    Raises:
        ValueError: if attention is neither `"eager"` nor `"sdpa"`, or FSDP shards the model.
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
    """A context for a backward pass inside the forward pass: FSDP reduces no gradients and frees no weights in it."""
    if not (shards := _sharding(model)):
        yield
        return
    context = shards[0]._get_fsdp_state()._state_ctx  # shared by all sharded modules, also those around the base
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
        ValueError: for FSDP version 1, which has no such switches.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("gradients cannot be taken within FSDP version 1: set fsdp_version to 2, or train with DDP")
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def prepare_checkpointing(model: nn.Module) -> None:
    """Make gradient checkpointing keep our cache, and recompute each layer in the contexts of its forward pass.

    Raises:
        ValueError: for reentrant checkpointing, which would cut the gradient of the read-outs.
    """
    for layer in model.modules():
        if not getattr(layer, "gradient_checkpointing", False):
            continue
        if not isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False  # a stack, as GPT-2's, would drop the cache; its layers keep theirs
            continue
        layer._can_checkpoint_with_cache = True
        function = layer._gradient_checkpointing_func
        if not isinstance(function, _CheckpointAsNow):
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise ValueError("gradient checkpointing with use_reentrant=True: pass use_reentrant=False")
            layer._gradient_checkpointing_func = _CheckpointAsNow(function, layer)


class _CheckpointAsNow:
    """Recomputes a layer in the contexts of its forward pass, since the backward pass runs outside of them.

    Args:
        checkpoint: the checkpointing function to call.
        layer: the layer that is checkpointed.
    """

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
    """Let us edit the model card of adapters of `method`, whenever one is saved or pushed.

    PEFT writes a card when an adapter is saved. transformers overwrites it when the adapter is pushed, right before the
    upload. So the card is edited after each of the two.

    Args:
        method: the PEFT method whose cards are edited.
        update: called as `update(model, folder, name)` once the card is in the folder.
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
    """Let PEFT report the status of an adapter without LoRA layers.

    PEFT asks the layers of an adapter whether they are enabled before it disables them. It fails if there are none.

    Args:
        method: the PEFT method whose adapters may have no LoRA layers.
    """
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
