"""What families of models differ in: shapes, windows, rotations, layers that cannot take LoRA."""

import sys

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ...tensors import eval_mode

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


def smallest_window(config) -> int:
    """How many places, padding included, the layer with the shortest sliding window sees; `sys.maxsize` without one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and {"sliding_attention", "chunked_attention"}.isdisjoint(kinds):
        return sys.maxsize
    if any("local" in str(kind) for kind in getattr(config, "attention_types", None) or []):  # GPT-Neo
        return config.window_size
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or sys.maxsize


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


def check_carries_nothing(model: nn.Module) -> None:
    """Refuse bases that carry another adapter, or whose weights are not in memory.

    Raises:
        ValueError: saying what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"the base carries an adapter of PEFT, such as in {name!r}: call merge_and_unload() on it first, or "
                "load the base without it"
            )
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"the base is offloaded in part, such as {name!r} (hf_device_map): load it where it fits as a whole, "
                "in a lower precision or quantized if need be"
            )


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Refuse bases whose tokens see those after them: they would be scored on answers that they have seen.

    Raises:
        ValueError: if the first token's hidden state depends on the second token.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return  # kernels of 8 bits treat large values of all tokens together
    vocab = model.get_input_embeddings().num_embeddings
    with eval_mode(model):
        first = [
            model.base_model(torch.tensor([[1 % vocab, other % vocab]], device=model.device), use_cache=False)
            for other in (2, 3)
        ]
    a, b = (found.last_hidden_state[0, 0].float() for found in first)
    if (a - b).abs().max() > 1e-3 * a.abs().max():
        raise ValueError(
            f"in {type(model).__name__} tokens see those after them, so it is no causal model: use one such as Llama, "
            "or load it as a decoder (config.is_decoder = True)"
        )


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
