"""Canaries: each fails with a readable message when a private API we lean on has moved."""

import inspect

import pytest
import torch
from peft import PeftModel, PeftModelForSequenceClassification
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from tiny import VOCAB, WINDOW, chunks, ids, make_base, make_model
from transformers import DynamicCache, FalconH1Config, GenerationConfig, RecurrentGemmaConfig, RwkvConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_iai.bases.registration
from hf_iai.bases.base import Base
from hf_iai.bases.compat import (
    READ_BY_WEIGHT,
    AttentionReceived,
    PrefixCache,
    default_target_modules,
    has_recurrent_layers,
    keys_values_of,
    lora_enabled,
    read_by_weight,
)


def test_peft_still_has_what_we_override():
    for name in ("inject_adapter", "_remove_adapter_name_from_key", "disable_adapter_layers", "enable_adapter_layers"):
        assert hasattr(BaseTuner, name), f"PEFT moved BaseTuner.{name}: see hf_iai/tuner.py"
    layer = next(m for m in make_model().modules() if isinstance(m, LoraLayer))
    assert layer._disable_adapters is False, "PEFT moved LoraLayer._disable_adapters: see compat.lora_enabled"


def test_peft_still_asks_for_the_classifier_where_we_undo_it():
    source = inspect.getsource(PeftModelForSequenceClassification)
    assert "peft_config.modules_to_save = classifier_module_names" in source, "see compat.leave_out_classifier"
    config = make_model(signal="gradients", regime="parametric").get_model_status()  # no layer at all
    assert (config.num_adapter_layers, config.enabled) == (0, True), "see compat.allow_no_layers"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_still_called_where_we_see_it(attention):
    base, text = make_base("llama", attention), ids(1, 8)
    with AttentionReceived(torch.ones_like(text), base.config.num_key_value_heads) as recording:
        base(input_ids=text)
    assert len(recording.layers) == base.config.num_hidden_layers, "see compat.AttentionReceived"


def test_caches_still_have_layers_of_keys_and_values():
    layers = keys_values_of(make_base()(ids(2, 5), use_cache=True).past_key_values)
    assert [keys.shape[:3] for keys, _ in layers] == [(2, 2, 5)] * 3, "see compat.keys_values_of"


def test_transformers_still_has_what_we_set():
    assert GradientCheckpointingLayer._can_checkpoint_with_cache is False, "see compat.prepare_checkpointing"
    layer = next(m for m in make_base().modules() if isinstance(m, GradientCheckpointingLayer))
    assert layer.gradient_checkpointing is False
    assert "past_key_values" in inspect.signature(type(layer).forward).parameters


def test_fsdp_still_has_what_inner_gradients_set():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPStateContext

    assert hasattr(FSDPModule, "_get_fsdp_state"), "see compat.inner_backward"
    assert {"all_states", "is_last_backward"} <= vars(FSDPStateContext()).keys()
    source = inspect.getsource(FSDPModule.set_requires_gradient_sync)
    assert "_fsdp_param_groups" in source and "all_reduce_grads" in source


def test_peft_still_says_which_modules_it_adapts():
    assert default_target_modules(make_base("llama").config) == ["q_proj", "v_proj"]
    assert default_target_modules(make_base("smollm3").config) == "all-linear"


def test_cards_are_still_written_where_we_follow():
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
    assert list(inspect.signature(create).parameters) == ["self", "output_dir"], "see compat.carry_cards"
    assert list(inspect.signature(upload).parameters)[:3] == ["self", "working_dir", "repo_id"]
    assert "self.create_or_update_model_card(save_directory)" in inspect.getsource(PeftModel.save_pretrained)
    push = inspect.getsource(PeftModel.push_to_hub)
    assert push.index("model_card.save(") < push.index("self._upload_modified_files("), "see compat.carry_cards"


def test_another_peft_is_refused(monkeypatch):
    monkeypatch.setattr(hf_iai.bases.registration.peft, "__version__", "0.30.0")
    with pytest.raises(ImportError, match="found 0.30.0"):
        hf_iai.bases.registration.register(None, None)


def test_prefix_cache_equals_dynamic_cache_and_is_read_only():
    base = make_base()
    prefix = [(torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)) for _ in range(3)]
    dynamic = DynamicCache(config=base.config)
    for layer, (keys, values) in enumerate(prefix):
        dynamic.update(keys, values, layer)
    cache = PrefixCache(base.config, prefix, record=4)
    query = ids(2, 7)
    expected = base(query, past_key_values=dynamic, use_cache=False).logits
    for _ in range(2):
        assert torch.equal(base(query, past_key_values=cache, use_cache=False).logits, expected)
    assert cache.get_seq_length() == 3
    assert all(k.shape[-2] == 4 for k, _ in cache.recorded())


def test_lora_switch_leaves_requires_grad_alone_and_restores_after_exceptions():
    model = make_model()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError), lora_enabled(layers, False):
        assert all(layer.disable_adapters for layer in layers)
        raise RuntimeError
    assert not any(layer.disable_adapters for layer in layers)
    assert before == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    "config", [RwkvConfig(), RecurrentGemmaConfig(num_hidden_layers=3), FalconH1Config()], ids=lambda c: c.model_type
)
def test_recurrences_that_would_be_read_wrongly_are_refused(config):
    with pytest.raises(ValueError, match=f"'{config.model_type}' has layers that are not attention.*one of .*'mamba'"):
        has_recurrent_layers(config)


def test_lora_on_layers_that_mamba_reads_by_weight():
    """transformers reads some weights of its mixers without calling the layer: see compat.read_by_weight."""
    assert read_by_weight(make_base("mamba")) == {f"mixer.{name}" for name in READ_BY_WEIGHT}
    assert read_by_weight(make_base("lfm2")) == read_by_weight(make_base("qwen3_next")) == set()
    names = {
        name for name, module in make_model("jamba", state_type="prompt").named_modules() if hasattr(module, "lora_A")
    }
    assert {name.split(".")[-1] for name in names if ".mamba." in name} == {"in_proj"}
    with pytest.raises(ValueError, match="target_modules names 'x_proj'.*'mamba' reads without calling"):
        make_model("mamba", state_type="prompt", target_modules=["in_proj", "x_proj"])
    assert "_check_target_module_compatiblity" in dir(BaseTuner), "PEFT moved it: see hf_iai/tuner.py"


def test_longrope_stays_within_the_length_where_keys_do_not_change():
    model = make_model("phi3_longrope")
    assert model.window == WINDOW // 2
    state, query = model.adapt(chunks(1)), ids(2, 50)
    with pytest.raises(ValueError, match="max_new_tokens <= 10, got 11"):
        model.generate(query, task_state=state, max_new_tokens=11)
    assert model.generate(query, task_state=state, max_new_tokens=10, eos_token_id=None).shape == (2, 60)
    for values in ({"max_new_tokens": 10}, {"max_length": 60}):
        settings = GenerationConfig(**values, do_sample=False, pad_token_id=0)
        assert model.generate(query, task_state=state, generation_config=settings).shape == (2, 60)


def test_a_base_without_positions_has_no_window():
    model = make_model("mamba", state_type="prompt")
    long = ids(1, 3 * WINDOW)
    assert model(input_ids=long, task_state=model.adapt([{"input_ids": long}])).logits.shape[1] == 3 * WINDOW
    with pytest.raises(ValueError, match="'mamba' has no window that a chunk could fill: pass chunk_size"):
        model.max_chunk_size  # noqa: B018


def test_reentrant_checkpointing_is_refused():
    model = make_model().train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    query = ids(1, 1, 5)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(input_ids=query, labels=query, chunk_input_ids=ids(1, 1, 5))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_embeddings_are_still_scaled_where_we_look(family):
    """The expected embedding of a token that is certain is its embedding; Gemma multiplies those by a number."""
    base, tokens = Base(make_base(family)), ids(2, 5)
    certain = torch.nn.functional.one_hot(tokens, VOCAB).float()
    difference = (base.expected_embedding(certain) - base.embed(tokens)).abs().max()
    assert difference < 1e-5, "transformers moved embed_scale: see compat.embedding_scale"
