"""The spine on every family: each check is one that test_reading, test_answering or test_roundtrip make in full."""

import pytest
import torch
from peft import PeftModel
from tiny import MORE_FAMILIES, STATES, chunks, ids, largest_difference, make_base, make_model

from hf_iai import TaskState
from hf_iai.base import Base, positions_of

ALL_STATES = [*STATES, "kept"]
every_family = pytest.mark.parametrize("family", MORE_FAMILIES)
every_state = pytest.mark.parametrize("state_type", ALL_STATES)


@every_family
@pytest.mark.parametrize("state_type", STATES)
def test_recent_untrained_is_fewer_shots(family, state_type):
    model = make_model(family, trained=False, state_type=state_type, accumulation="recent")
    text, query = ids(2, 30), ids(2, 9, seed=1)
    state = model.adapt([{"input_ids": text[:, a:b]} for a, b in ((0, 3), (3, 17), (17, 30))])
    expected = make_base(family)(torch.cat([text[:, -4:], query], 1)).logits[:, 4:]
    assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-5


@every_family
@every_state
def test_sequence_parallel_and_merge(family, state_type):
    model, support = make_model(family, state_type=state_type, correction=False), chunks(5)
    sequence = model.adapt(support)
    assert largest_difference(sequence, model.adapt(support, parallel=3)) < 1e-5
    assert largest_difference(sequence, TaskState.merge([model.adapt([chunk]) for chunk in support])) < 1e-5


@every_family
@every_state
def test_left_padding_and_batches_change_nothing(family, state_type):
    """Two tasks with a state each, of unequal length, in one batch and alone."""
    model = make_model(family, state_type=state_type)
    texts, queries = [ids(1, 10), ids(1, 7, seed=1)], [ids(1, 6, seed=2), ids(1, 4, seed=3)]
    batch = [left_padded(t) for t in (texts, queries)]
    state = model.adapt([batch[0]])
    together = model(**batch[1], task_state=state).logits
    for row, (text, query) in enumerate(zip(texts, queries, strict=True)):
        alone = model(input_ids=query, task_state=model.adapt([{"input_ids": text}])).logits
        assert (together[row : row + 1, -query.shape[1] :] - alone).abs().max() < 1e-5


@every_family
@every_state
def test_generate(family, state_type):
    """Cached = step by step, greedy; beams and seeded sampling run; two tasks in one batch equal single calls."""
    model, query = make_model(family, state_type=state_type), ids(2, 6, seed=3)
    state = model.adapt(chunks(3))
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(query, task_state=state, do_sample=False, **options)
    out = query
    for _ in range(5):
        out = torch.cat([out, model(input_ids=out, task_state=state).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected)
    for row in range(2):
        single = model.generate(query[row : row + 1], task_state=state.select(row), do_sample=False, **options)
        assert torch.equal(single, expected[row : row + 1])
    beams = model.generate(query, task_state=state, num_beams=3, do_sample=False, **options)
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(model.generate(query, task_state=state, do_sample=True, **options))
    assert beams.shape == expected.shape and torch.equal(*samples)


@pytest.mark.parametrize("family", [f for f in MORE_FAMILIES if f != "opt"])  # its positions are absolute
def test_keys_are_moved_exactly(family):
    """Keys read at positions 7.. and moved back by 7 are those read at 0.., in every layer."""
    base, text = Base(make_base(family)), ids(2, 12)
    mask = torch.ones_like(text)
    read = lambda shift: base.read(  # noqa: E731
        base.no_prefix(2), base.embed(text), mask, positions_of(mask) + shift, record=12
    )[1]
    here, there = (torch.stack([k for k, _ in keys_values], 1) for keys_values in (read(0), read(7)))
    back = base.rotate(there, torch.full((1, 12), -7))
    assert (back - here).abs().max() < 1e-4 and (there - here).abs().max() > 1e-2


@every_family
@every_state
def test_text_longer_than_a_sliding_window(family, state_type):
    """A long query, cached in two parts = in one pass."""
    model = make_model(family, state_type=state_type)
    state, query = model.adapt(chunks(2, batch=1, size=30)), ids(1, 40, seed=4)
    out = model.generate(query, task_state=state, do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    again = model(input_ids=out[:, :-1], task_state=state).logits[:, 39:].argmax(-1)
    assert torch.equal(out[:, 40:], again)


@every_family
@every_state
def test_saved_and_loaded(family, state_type, tmp_path):
    model, query = make_model(family, state_type=state_type), ids(2, 6, seed=3)
    state = model.adapt(chunks(2))
    model.save_pretrained(tmp_path / "adapter")
    state.save_pretrained(tmp_path / "state")
    again = PeftModel.from_pretrained(make_base(family), tmp_path / "adapter").eval()
    loaded = TaskState.from_pretrained(tmp_path / "state")
    expected = model(input_ids=query, task_state=state).logits
    assert torch.equal(again(input_ids=query, task_state=loaded).logits, expected)


@every_family
@every_state
def test_an_episode_trains_everything(family, state_type):
    model = make_model(family, state_type=state_type).train()
    support = torch.stack([chunk["input_ids"] for chunk in chunks(2)], 1)  # (B, K, C)
    query = ids(2, 1, 8, seed=3)
    model(input_ids=query, labels=query, chunk_input_ids=support).loss.backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []


def left_padded(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(text.shape[1] for text in texts)
    rows = [torch.nn.functional.pad(text, (width - text.shape[1], 0)) for text in texts]
    input_ids = torch.cat(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}
