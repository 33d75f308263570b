"""Tiny random bases and adapters, built from configurations: decoders, encoders, and bases that read vectors."""

from itertools import product

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    Olmo2Config,
    OlmoHybridConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RobertaConfig,
    SmolLM3Config,
    StableLmConfig,
)

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
_SMALL = _COMMON | {"num_hidden_layers": 2}  # for the families that tests/test_families.py alone goes through
_SMALL_NO_GROUPS = {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"}
_ROPE = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": WINDOW // 2}
_LLAMA3 = _ROPE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = _ROPE | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
_MORE_CONFIGS = {
    "qwen2": lambda: Qwen2Config(**_SMALL),
    "mistral": lambda: MistralConfig(**_SMALL, sliding_window=24),
    "gemma2": lambda: Gemma2Config(**_SMALL, head_dim=16, sliding_window=24, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(
        **_SMALL, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SMALL_NO_GROUPS, hidden_dropout=0.0, attention_dropout=0.0),
    "opt": lambda: OPTConfig(**_SMALL_NO_GROUPS, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "phi3": lambda: Phi3Config(**_SMALL),
    "smollm3": lambda: SmolLM3Config(**_SMALL, no_rope_layers=[1, 0]),
    "stablelm": lambda: StableLmConfig(**_SMALL),
    "falcon": lambda: FalconConfig(**_SMALL_NO_GROUPS, alibi=False),
    "falcon_new": lambda: FalconConfig(**_SMALL_NO_GROUPS, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "olmo2": lambda: Olmo2Config(**_SMALL),
    "mixtral": lambda: MixtralConfig(**_SMALL, num_local_experts=2, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "llama_tied": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "llama_linear": lambda: LlamaConfig(**_SMALL, rope_parameters={"rope_type": "linear"} | _ROPE),
    "llama_yarn": lambda: LlamaConfig(**_SMALL, rope_parameters={"rope_type": "yarn"} | _ROPE),
    "llama_llama3": lambda: LlamaConfig(**_SMALL, rope_parameters={"rope_type": "llama3"} | _LLAMA3),
    "llama_dynamic": lambda: LlamaConfig(**_SMALL, rope_parameters={"rope_type": "dynamic"} | _ROPE),
    "phi3_longrope": lambda: Phi3Config(
        **_SMALL, original_max_position_embeddings=WINDOW // 2, rope_parameters={"rope_type": "longrope"} | _LONGROPE
    ),
}
_NO_ATTENTION = {
    name: _SMALL[name]
    for name in _SMALL
    if "heads" not in name and name not in ("intermediate_size", "max_position_embeddings")
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_RECURRENT_CONFIGS = {  # bases with layers that are not attention
    "mamba": lambda: MambaConfig(**_NO_ATTENTION, state_size=8),
    "mamba2": lambda: Mamba2Config(**_NO_ATTENTION, state_size=8, head_dim=16, num_heads=4, n_groups=1, chunk_size=16),
    "jamba": lambda: JambaConfig(
        **_SMALL, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=2, num_experts_per_tok=1, mamba_d_state=8,
    ),
    "lfm2": lambda: Lfm2Config(**_SMALL, layer_types=["conv", "full_attention"]),
    "qwen3_next": lambda: Qwen3NextConfig(**_SMALL, **_EXPERTS, **_DELTA, shared_expert_intermediate_size=16),
    "falcon_mamba": lambda: FalconMambaConfig(**_NO_ATTENTION, state_size=8),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **_SMALL, **_MAMBA2, shared_intermediate_size=48, num_local_experts=0,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2_moe": lambda: Lfm2MoeConfig(
        **_SMALL, **_EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention"]
    ),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**_SMALL, **_DELTA),
    "olmo_hybrid": lambda: OlmoHybridConfig(**_SMALL, layer_types=["linear_attention", "full_attention"]),
}  # fmt: skip
ATTENTION_FAMILIES, RECURRENT_FAMILIES = FAMILIES + list(_MORE_CONFIGS), list(_RECURRENT_CONFIGS)
_CONFIGS |= _MORE_CONFIGS | _RECURRENT_CONFIGS
# Blocks of 64 weights are what 4-bit kernels read.
_CONFIGS["llama_64"] = lambda: LlamaConfig(**(_COMMON | {"hidden_size": 64, "intermediate_size": 128}))
_EAGER_ONLY = ("gemma2", "mamba", "mamba2", "falcon_mamba")  # the Mambas have no attention to choose
STATES = ["prefix", "prompt"]
REGIMES = ["explicit", "parametric"]
AVERAGES = list(product(FAMILIES, STATES, REGIMES))
# A prefix whose last two slots keep single tokens, and one whose tokens replace what they rewrite.
VARIANTS = {"kept": {"num_kept_tokens": 2}, "delta": {"delta_rule": True}}
MEMBERS = AVERAGES + [("llama", variant, regime) for variant in VARIANTS for regime in REGIMES]


def make_base(family: str = "llama", attention: str = "sdpa"):
    torch.manual_seed(0)
    attention = "eager" if family in _EAGER_ONLY else attention
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](), attn_implementation=attention)
    sharper = 1.5 if "mamba" in family else 3.0  # more and a Mamba multiplies every rounding error
    for parameter in model.parameters():  # sharper predictions, so that equal tokens mean something
        parameter.data.mul_(sharper if parameter.dim() > 1 else 1.0)
    return model.eval()


def make_model(base="llama", attention: str = "sdpa", *, trained: bool = True, **config):
    """An adapter whose zero-initialised parts were disturbed, so that all of it has an effect.

    `base`: a family's name, or a model.
    """
    base = make_base(base, attention) if isinstance(base, str) else base
    torch.manual_seed(1)
    if config.get("state_type") in VARIANTS:
        config |= {"state_type": "prefix"} | VARIANTS[config["state_type"]]
    slots = None if config.get("regime") == "implicit" else SLOTS
    defaults = {"task_type": "CAUSAL_LM", "num_state_tokens": slots, "r": 2, "target_modules": "all-linear"}
    model = get_peft_model(base, IAIConfig(**(defaults | config))).eval()
    if trained:
        disturb(model)
    return model


def gradient_model(family="llama", *args, **config):
    """An adapter of `signal="gradients"`; a lora state updates all linear layers."""
    return lora_state_model(family, *args, **({"signal": "gradients"} | config))


def lora_state_model(family="llama", *args, **config):
    """`make_model`, but a lora state is small and updates all linear layers."""
    if config.get("state_type") == "lora":
        config = {"state_r": 2, "state_target_modules": "all-linear"} | config
    return make_model(family, *args, **config)


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


# ---------------------------------------------------------------- encoders and their classifiers

_ENCODER = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ENCODERS = {
    "bert": lambda: BertConfig(**_ENCODER),
    "roberta": lambda: RobertaConfig(**_ENCODER, pad_token_id=0),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=400, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "modernbert": lambda: ModernBertConfig(
        **_ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1, local_attention=8
    ),
}


def make_encoder(family: str = "bert"):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(ENCODERS[family]())
    for parameter in base.parameters():  # features that differ, and no weight at its first value
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0).add_(0.1 * torch.randn_like(parameter))
    return base.eval()


def make_classifier(family="bert", *, trained: bool = True, **config):
    """An adapter with a linear state. `family`: an encoder's name, or a base."""
    base = make_encoder(family) if isinstance(family, str) else family
    torch.manual_seed(1)
    model = get_peft_model(base, IAIConfig(**({"task_type": "SEQ_CLS", "state_type": "linear", "r": 2} | config)))
    if trained:
        disturb(model)
    return model.eval()


# ---------------------------------------------------------------- bases that read vectors

VECTOR_WIDTH, CLASSES, TARGETS, VECTOR_WINDOW = 5, 3, 2, 32
OUTPUTS = {"softmax": CLASSES, "gaussian": TARGETS}
VECTOR_SIZES = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
VECTOR_BASES = {
    "llama": lambda: LlamaConfig(
        **VECTOR_SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=VECTOR_WINDOW, initializer_range=0.2,
    ),
    "gpt2": lambda: GPT2Config(
        **VECTOR_SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=VECTOR_WINDOW, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


def make_vector_base(family: str = "llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(VECTOR_BASES[family]()).eval()


def make_vector_model(base="llama", *, trained: bool = True, likelihood: str = "softmax", **config):
    """An adapter of `vector_width`. `base`: a family's name, or a model."""
    base = make_vector_base(base) if isinstance(base, str) else base
    torch.manual_seed(1)
    values = {"vector_width": VECTOR_WIDTH, "num_outputs": OUTPUTS[likelihood], "likelihood": likelihood}
    values |= {"task_type": "CAUSAL_LM", "r": 8} | config
    if values.get("signal") != "gradients":  # for which no base reads
        values = {"target_modules": "all-linear"} | values
    model = get_peft_model(base, IAIConfig(**values)).eval()
    if trained:
        disturb(model, 0.1)
    return model
