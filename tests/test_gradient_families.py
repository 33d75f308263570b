"""Gradients on every family: they run, padding and batches change nothing, and everything trains."""

import pytest
import torch
from tiny import ATTENTION_FAMILIES, RECURRENT_FAMILIES, chunks, gradient_model, ids, largest_difference

from hf_iai import TaskState, batch_chunks

FAST = ("gemma3", "mistral", "opt", "falcon", "mixtral", "smollm3", "mamba", "jamba")
CASES = [(f, s) for f in ATTENTION_FAMILIES for s in ("prefix", "prompt", "lora")]
CASES += [(f, s) for f in RECURRENT_FAMILIES for s in ("prompt", "lora")]
CASES = [
    pytest.param(f, s, marks=[] if f in FAST and s == "lora" else pytest.mark.slow, id=f"{f}-{s}") for f, s in CASES
]


@pytest.mark.parametrize(("family", "state_type"), CASES)
def test_gradients(family, state_type):
    model = gradient_model(family, state_type=state_type, initial_rate=0.2)
    one, two = chunks(2, batch=1, seed=4), chunks(1, batch=1, size=7, seed=5)
    together, apart = model.adapt(batch_chunks([one, two])), [model.adapt(one), model.adapt(two)]
    theta = list(model.core.state.start)
    for state in (together, *apart):
        assert all(torch.isfinite(t).all() for t in state.tensors.values())
    expected = TaskState.stack(apart)
    for name in theta:
        scale = max(1, expected.tensors[name].abs().max())
        assert (together.tensors[name] - expected.tensors[name]).abs().max() < 1e-4 * scale, name
    assert largest_difference(together, model.initial_state(2)) > 1e-3
    query = ids(2, 8, seed=3)
    answers = model(input_ids=query, task_state=together).logits
    assert (answers[1] - model(input_ids=query[1:], task_state=together.select(1)).logits[0]).abs().max() < 1e-4
    new = model.generate(query, task_state=together, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert torch.equal(new[:, 8], answers[:, -1].argmax(-1))
    model.train()(
        input_ids=query.unsqueeze(1), labels=query.unsqueeze(1), chunk_input_ids=ids(2, 2, 10)
    ).loss.backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []
