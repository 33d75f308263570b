"""vector_base: a base for given vectors. It has no layers, returns vectors as they are, and needs no download."""

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

VECTOR_BASE = "hf_iai:vectors-"  # with the width added, this is the base's name in saved adapters
_EPS = 1e6  # eps of Llama's last norm, far above the mean square of a vector


def vector_base(width: int) -> PreTrainedModel:
    """Make a base for a linear state over given vectors, for `get_peft_model` and `PeftModel.from_pretrained`.

    It is a Llama without layers, so only its last norm is left: g x / sqrt(mean(x^2) + eps). With eps = 10^6 and
    g = sqrt(eps) this returns x, up to a factor of 1 - mean(x^2) / (2 eps). No weight is random, so an adapter fits
    every base of the same width. The token embeddings and the classifier head are not used and are 0.

    Args:
        width: d, the width of the vectors.

    Raises:
        ValueError: if the width is below 1.

    Example:
        >>> import torch
        >>> from hf_iai import vector_base
        >>> base = vector_base(3)
        >>> base.model(inputs_embeds=torch.tensor([[[1.0, -2.0, 0.5]]])).last_hidden_state.round(decimals=4).tolist()
        [[[1.0, -2.0, 0.5]]]
    """
    if width < 1:
        raise ValueError(f"vectors must have a width of at least 1, got {width}")
    sizes = {"hidden_size": width, "num_hidden_layers": 0, "num_attention_heads": 1, "head_dim": 2}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | {"vocab_size": 1}
    base = AutoModelForSequenceClassification.from_config(LlamaConfig(**sizes, **tokens, rms_norm_eps=_EPS))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
        base.model.norm.weight.fill_(_EPS**0.5)
    base.name_or_path = base.config._name_or_path = f"{VECTOR_BASE}{width}"
    return base


def width_in_name(name: str | None) -> int | None:
    """The width in the name of a vector base; None if the name is that of another base."""
    return int(name.removeprefix(VECTOR_BASE)) if name and name.startswith(VECTOR_BASE) else None
