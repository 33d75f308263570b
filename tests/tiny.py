"""Tiny random bases and adapters, built from configurations."""

from itertools import product

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from hf_iai import IAIConfig

VOCAB, WINDOW, SLOTS = 97, 128, 4
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=WINDOW, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
FAMILIES = list(_CONFIGS)
STATES = ["prefix", "prompt"]
REGIMES = ["explicit", "parametric"]
AVERAGES = list(product(FAMILIES, STATES, REGIMES))
# "kept": a prefix whose last two slots keep single tokens.
MEMBERS = AVERAGES + [("llama", "kept", regime) for regime in REGIMES]


def make_base(family: str = "llama", attention: str = "sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](), attn_implementation=attention)
    for parameter in model.parameters():  # sharper predictions, so that equal tokens mean something
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def make_model(base="llama", attention: str = "sdpa", *, trained: bool = True, **config):
    """An adapter whose zero-initialised parts were disturbed, so that all of it has an effect.

    `base`: a family's name, or a model.
    """
    base = make_base(base, attention) if isinstance(base, str) else base
    torch.manual_seed(1)
    if config.get("state_type") == "kept":
        config |= {"state_type": "prefix", "num_kept_tokens": 2}
    defaults = {"task_type": "CAUSAL_LM", "num_state_tokens": SLOTS, "r": 2, "target_modules": "all-linear"}
    model = get_peft_model(base, IAIConfig(**(defaults | config))).eval()
    if trained:
        disturb(model)
    return model


def disturb(model, scale: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def chunks(num: int, batch: int = 2, size: int = 10, seed: int = 0) -> list[dict]:
    return [{"input_ids": c} for c in ids(batch, num * size, seed=seed).split(size, 1)]


def largest_difference(a, b) -> float:
    return max((a.tensors[name] - b.tensors[name]).abs().max().item() for name in a.tensors)
