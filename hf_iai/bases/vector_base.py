"""A base for given vectors: it has no layer, hands them on as they are, and is made without a download."""

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

VECTOR_BASE = "hf_iai:vectors-"  # and the width: what an adapter on such a base names as its base
_EPS = 1e6  # of the norm that Llama ends in, far above the mean square of a vector


def vector_base(width: int) -> PreTrainedModel:
    """The base of a linear state over vectors of that width, for `get_peft_model` and `PeftModel.from_pretrained`.

    A Llama without layers is its last norm, g x / sqrt(mean(x^2) + eps), which with eps = 10^6 and g = sqrt(eps) gives
    x back but for a factor of 1 - mean(x^2) / (2 eps). Nothing of it is random, so that an adapter fits every such
    base: the embeddings of tokens, which are not used, and the classifier's own head are 0.

    Args:
        width: d.

    Raises:
        ValueError: for a width below 1.

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


def vector_width(name: str | None) -> int | None:
    """Of the vector base that an adapter names; None for another base."""
    return int(name.removeprefix(VECTOR_BASE)) if name and name.startswith(VECTOR_BASE) else None
