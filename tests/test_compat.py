"""Canaries: each fails with a readable message when a private API we lean on has moved."""

import inspect

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from tiny import ids, make_base, make_model
from transformers import DynamicCache, MambaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_iai.registration
from hf_iai.compat import PrefixCache, key_value_shape, lora_enabled


def test_peft_still_has_what_we_override():
    for name in ("inject_adapter", "_remove_adapter_name_from_key", "disable_adapter_layers", "enable_adapter_layers"):
        assert hasattr(BaseTuner, name), f"PEFT moved BaseTuner.{name}: see hf_iai/model.py"
    layer = next(m for m in make_model().modules() if isinstance(m, LoraLayer))
    assert layer._disable_adapters is False, "PEFT moved LoraLayer._disable_adapters: see compat.lora_enabled"


def test_transformers_still_has_what_we_set():
    assert GradientCheckpointingLayer._can_checkpoint_with_cache is False, "see compat.prepare_checkpointing"
    layer = next(m for m in make_base().modules() if isinstance(m, GradientCheckpointingLayer))
    assert layer.gradient_checkpointing is False
    assert "past_key_values" in inspect.signature(type(layer).forward).parameters


def test_cards_are_still_written_where_we_follow():
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
    assert list(inspect.signature(create).parameters) == ["self", "output_dir"], "see compat.carry_cards"
    assert list(inspect.signature(upload).parameters)[:3] == ["self", "working_dir", "repo_id"]
    assert "self.create_or_update_model_card(save_directory)" in inspect.getsource(PeftModel.save_pretrained)
    push = inspect.getsource(PeftModel.push_to_hub)
    assert push.index("model_card.save(") < push.index("self._upload_modified_files("), "see compat.carry_cards"


def test_another_peft_is_refused(monkeypatch):
    monkeypatch.setattr(hf_iai.registration.peft, "__version__", "0.30.0")
    with pytest.raises(ImportError, match="found 0.30.0"):
        hf_iai.registration.register(None, None)


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


def test_bases_without_attention_are_refused():
    with pytest.raises(ValueError, match="'mamba'"):
        key_value_shape(MambaConfig())


def test_reentrant_checkpointing_is_refused():
    model = make_model().train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    query = ids(1, 1, 5)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(input_ids=query, labels=query, chunk_input_ids=ids(1, 1, 5))
