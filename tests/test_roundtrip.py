"""Saving and loading of adapters and states, identity, and a new process."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from tiny import chunks, disturb, ids, make_base, make_model
from transformers import AutoModelForCausalLM

from hf_iai import TaskState
from hf_iai.state import CONFIG, WEIGHTS

# Every member is saved and loaded in test_contract.py, in one way.
WAYS = [("llama", "prefix", "explicit"), ("qwen3", "delta", "parametric"), ("gpt2", "prompt", "parametric")]


@pytest.mark.parametrize(("family", "state_type", "regime"), WAYS)
def test_adapter_survives_every_way_of_loading(tmp_path, family, state_type, regime):
    make_base(family).save_pretrained(tmp_path / "base")
    base = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # noqa: E731
    model = make_model(base(), state_type=state_type, regime=regime)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter").rename(tmp_path / "moved")
    support, query = chunks(2), ids(2, 7, seed=1)
    state = model.adapt(support)
    expected = model(input_ids=query, task_state=state).logits

    for loaded in (
        PeftModel.from_pretrained(base(), tmp_path / "moved"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "moved"),
        PeftModel.from_pretrained(base(), tmp_path / "moved", adapter_name="other"),
    ):
        loaded.eval()
        assert (loaded(input_ids=query, task_state=loaded.adapt(support)).logits - expected).abs().max() == 0.0
        # The same adapter, so the state made before it was saved is welcome.
        assert (loaded(input_ids=query, task_state=state).logits - expected).abs().max() == 0.0


@pytest.mark.parametrize("state_type", [pytest.param("prefix", marks=pytest.mark.slow), "kept"])
def test_state_continues_in_a_new_process_bitwise(tmp_path, state_type):
    make_base().save_pretrained(tmp_path / "base")
    model = make_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), state_type=state_type)
    model.save_pretrained(tmp_path / "adapter")
    support = chunks(8)
    model.adapt(support[:5]).save_pretrained(tmp_path / "state")
    save_file({str(i): c["input_ids"].contiguous() for i, c in enumerate(support[5:])}, tmp_path / "rest.safetensors")
    script = """
import sys, hf_iai
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
folder = sys.argv[1]
model = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter")
rest = [{"input_ids": ids} for _, ids in sorted(load_file(folder + "/rest.safetensors").items())]
state = hf_iai.TaskState.from_pretrained(folder + "/state")
model.adapt(rest, state=state).save_pretrained(folder + "/end")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], check=True)
    end, whole = TaskState.from_pretrained(tmp_path / "end"), model.adapt(support)
    assert all(torch.equal(end.tensors[n], whole.tensors[n]) for n in whole.tensors)
    assert torch.equal(end.step, whole.step)


def test_identity_changes_with_training_only(tmp_path):
    model = make_model()
    before = model.identity
    model.eval().train()
    assert model.identity == before
    disturb(model, 1e-4)
    assert model.identity != before
    before = model.identity
    # Fused optimizers change values without counting a version.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    query = ids(1, 1, 6)
    model(input_ids=query, labels=query, chunk_input_ids=ids(1, 1, 6)).loss.backward()
    optimizer.step()
    assert model.identity != before


def test_state_of_another_base_is_refused():
    model, same_shape = make_model(), make_model()
    with torch.no_grad():
        same_shape.base_model.model.model.embed_tokens.weight.mul_(1.5)
    same_shape.base_model._identities.clear()
    with pytest.raises(ValueError, match="belongs to"):
        same_shape(input_ids=ids(2, 5), task_state=model.adapt(chunks(1)))


def test_two_adapters_on_one_base(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    query, state = ids(2, 5, seed=1), model.adapt(chunks(2))
    expected = model(input_ids=query, task_state=state).logits
    model.load_adapter(tmp_path, adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(model(input_ids=query, task_state=state).logits, expected)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(input_ids=query, task_state=state).logits, expected)


def test_state_files(tmp_path):
    state = make_model().adapt(chunks(2))
    state.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CONFIG, WEIGHTS])
    again = TaskState.from_pretrained(tmp_path)
    assert again.identity == state.identity and again.nbytes == state.nbytes
    assert all(torch.equal(again.tensors[n], state.tensors[n]) for n in state.tensors)


def test_states_that_do_not_go_together():
    model = make_model()
    state = model.adapt(chunks(3))
    with pytest.raises(ValueError, match="at least one"):
        TaskState.stack([])
    with pytest.raises(ValueError, match="different batches"):
        TaskState.merge([state.select(0), state])
    other = make_model(num_state_tokens=5).adapt(chunks(1))
    other = replace(other, identity=replace(other.identity, name="another"))
    with pytest.raises(ValueError, match=re.escape(f"{state.identity.name!r} and 'another'")):
        TaskState.merge([state, other])
