"""The core on every family and state.

examples/maintain/families_table.py runs this file and writes docs/families.md.
"""

from functools import cache

import pytest
import torch
from peft import PeftModel
from tiny import (
    ATTENTION_FAMILIES,
    RECURRENT_FAMILIES,
    SLOTS,
    STATES,
    chunks,
    ids,
    largest_difference,
    make_base,
    make_model,
)
from transformers import DynamicCache

from hf_iai import TaskState, batch_chunks
from hf_iai.bases.places import positions_of

# Kept tokens differ by how keys are moved, prompts do not by how the same base rotates them: one of each is fast.
KEPT = ("llama", "gpt2", "gemma3", "smollm3", "gpt_neox", "phi3_longrope")


def with_marks(cases: list[tuple[str, str]], fast) -> list:
    return [case if fast(*case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


NO_KEPT_CASES = [(f, s) for s in STATES for f in ATTENTION_FAMILIES] + [(f, "prompt") for f in RECURRENT_FAMILIES]
RECENT_CASES = with_marks(NO_KEPT_CASES, lambda family, state: state == "prefix" or "llama_" not in family)
CASES = RECENT_CASES + with_marks([(f, "kept") for f in ATTENTION_FAMILIES], lambda family, state: family in KEPT)
ABSOLUTE = ("gpt2", "opt")  # positions are added to the embeddings: keys cannot be moved
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
GRAPH_BREAKS = ("llama_dynamic",)  # transformers' own rotation branches on the length of the text
every_case = pytest.mark.parametrize(("family", "state_type"), CASES)
shared_model = cache(make_model)  # for checks that leave the model as it is
bare_base = cache(lambda family: make_base(family).requires_grad_(False))


@every_case
def test_answers_equal_a_reference(family, state_type):
    """The reference writes the state into transformers' own DynamicCache, or feeds the prompt as embeddings."""
    model = shared_model(family, state_type=state_type, correction=False)
    state, query = model.adapt(chunks(2)), ids(2, 9, seed=1)
    with torch.no_grad(), model.reader.base.lora(True):
        if state_type == "prompt":
            embedded = model.get_input_embeddings()(query)
            embedded = torch.cat([state.tensors["prompt"][:, 0, 0], embedded], 1)
            expected = model.base_model.model(inputs_embeds=embedded).logits[:, SLOTS:]
        else:
            keys, values = state.tensors["key"], state.tensors["value"]
            if state_type == "kept":
                kept = model.reader.base.rotate(state.tensors["kept_key"], torch.tensor([[2, 3]]))
                keys, values = torch.cat([keys, kept], -2), torch.cat([values, state.tensors["kept_value"]], -2)
            written = DynamicCache(config=model.config)
            for layer in range(keys.shape[1]):
                written.update(keys[:, layer], values[:, layer], layer)
            expected = model.base_model.model(input_ids=query, past_key_values=written).logits
    out = model(input_ids=query, labels=query, task_state=state)
    assert (out.logits - expected).abs().max() < 1e-5
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), query[:, 1:].flatten())
    assert (out.loss - loss).abs() < 1e-5
    other = model(input_ids=query, task_state=model.adapt(chunks(2, seed=7))).logits
    assert (out.logits - other).abs().max() > 1e-4, "the state has no effect"


@pytest.mark.parametrize(("family", "state_type"), RECENT_CASES)
def test_recent_untrained_is_fewer_shots(family, state_type):
    model = make_model(family, trained=False, state_type=state_type, accumulation="recent")
    text, query = ids(2, 30), ids(2, 9, seed=1)
    state = model.adapt([{"input_ids": text[:, a:b]} for a, b in ((0, 3), (3, 17), (17, 30))])
    expected = bare_base(family)(torch.cat([text[:, -4:], query], 1)).logits[:, 4:]
    assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-5


@every_case
def test_sequence_parallel_and_merge(family, state_type):
    model, support = shared_model(family, state_type=state_type, correction=False), chunks(3)
    sequence, singles = model.adapt(support), [model.adapt([chunk]) for chunk in support]
    assert largest_difference(sequence, model.adapt(support, parallel=2)) < 1e-5
    assert largest_difference(sequence, TaskState.merge(singles)) < 1e-5
    if state_type == "prompt":
        mean = torch.stack([s.tensors["prompt"] for s in singles]).mean(0)
        assert (sequence.tensors["prompt"] - mean).abs().max() < 1e-5
    assert largest_difference(sequence, singles[-1]) > 1e-3


@pytest.mark.parametrize(
    ("family", "state_type"),
    with_marks([(f, "delta") for f in ATTENTION_FAMILIES], lambda family, state: family in KEPT),
)
def test_the_delta_rule(family, state_type):
    """In sequence = in parallel; all of it trains."""
    model, support = make_model(family, state_type=state_type), chunks(3)
    state = model.adapt(support)
    assert largest_difference(state, model.adapt(support, parallel=2)) < 1e-4
    query, read = ids(2, 1, 8, seed=3), torch.stack([chunk["input_ids"] for chunk in support], 1)
    model.train()(input_ids=query, labels=query, chunk_input_ids=read).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@every_case
def test_padding_masked_rows_and_batches_change_nothing(family, state_type):
    model = shared_model(family, state_type=state_type)
    texts, queries = [ids(1, 10), ids(1, 7, seed=1)], [ids(1, 6, seed=2), ids(1, 4, seed=3)]
    alone = [model.adapt([{"input_ids": text}]) for text in texts]
    expected = [model(input_ids=q, task_state=s).logits[0] for q, s in zip(queries, alone, strict=True)]
    for left in (True, False):
        support, query = padded(texts, left), padded(queries, left)
        state = model.adapt([support])
        together = model(**query, task_state=state).logits
        for row in range(2):
            assert largest_difference(state.select(row), alone[row]) < 1e-5
            assert (together[row][query["attention_mask"][row] > 0] - expected[row]).abs().max() < 1e-5
    # What stands under the mask does not matter, bitwise; a row that is all masked keeps its state, bitwise.
    hidden = {"input_ids": support["input_ids"].where(support["attention_mask"] > 0, 50)}
    same = model.adapt([support | hidden])
    assert all(torch.equal(same.tensors[n], state.tensors[n]) for n in state.tensors)
    after = model.adapt([{"input_ids": texts[0].expand(2, -1), "attention_mask": mask_of_first_row(10)}], state=state)
    assert all(torch.equal(after.tensors[n][1], state.tensors[n][1]) for n in state.tensors)
    assert after.step.tolist() == [2, 1] and after.num_tokens.tolist() == [20, 7]


@every_case
def test_streams_of_different_length_in_one_batch(family, state_type):
    model = shared_model(family, state_type=state_type)
    one, two = chunks(2, batch=1, seed=4), chunks(1, batch=1, size=7, seed=5)
    together, apart = model.adapt(batch_chunks([one, two])), [model.adapt(one), model.adapt(two)]
    assert largest_difference(together, TaskState.stack(apart)) < 1e-5
    # One state for all queries.
    query = ids(3, 6, seed=3)
    answers = model(input_ids=query, task_state=apart[0]).logits
    single = model(input_ids=query[1:2], task_state=apart[0]).logits
    assert (answers[1:2] - single).abs().max() < 1e-5


@every_case
def test_generate(family, state_type):
    """Cached = step by step; padded on the left = not padded; two tasks in one batch = single calls."""
    model, query = shared_model(family, state_type=state_type), ids(2, 6, seed=3)
    state = model.adapt(chunks(2))
    expected = model.generate(query, task_state=state, max_new_tokens=4, **GREEDY)
    out = query
    for _ in range(4):
        out = torch.cat([out, model(input_ids=out, task_state=state).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected)
    single = model.generate(query[1:], task_state=state.select(1), max_new_tokens=4, **GREEDY)
    assert torch.equal(single, expected[1:])
    left = padded([ids(1, 8, seed=8), query[1:]], left=True)
    assert torch.equal(model.generate(**left, task_state=state, max_new_tokens=4, **GREEDY)[1:, 8:], expected[1:, 6:])


@every_case
def test_beams_and_seeded_samples(family, state_type):
    model, query = shared_model(family, state_type=state_type), ids(2, 6, seed=3)
    state, few = model.adapt(chunks(1)), {"max_new_tokens": 3}
    beams = model.generate(query, task_state=state, num_beams=3, **few, **GREEDY)
    alone = model.generate(query[:1], task_state=state.select(0), num_beams=3, **few, **GREEDY)
    assert beams.shape == (2, 9) and torch.equal(beams[:1], alone)
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(
            model.generate(query, task_state=state, **few, **(GREEDY | {"do_sample": True}), num_return_sequences=2)
        )
    assert samples[0].shape == (4, 9) and torch.equal(*samples)


@every_case
def test_text_longer_than_a_sliding_window(family, state_type):
    """A long query, cached in two parts = in one pass."""
    model = shared_model(family, state_type=state_type)
    state, query = model.adapt(chunks(2, batch=1, size=30)), ids(1, 40, seed=4)
    out = model.generate(query, task_state=state, max_new_tokens=3, **GREEDY)
    again = model(input_ids=out[:, :-1], task_state=state).logits[:, 39:].argmax(-1)
    assert torch.equal(out[:, 40:], again)


@pytest.mark.parametrize("state_type", ["prefix", "kept"])
@pytest.mark.parametrize("family", [f for f in ATTENTION_FAMILIES if f not in ABSOLUTE])
def test_keys_are_moved_exactly(family, state_type):
    """Keys read at positions 7.. and moved back by 7 are those read at 0.., in every layer."""
    base, text = shared_model(family, state_type=state_type).reader.base, ids(2, 12)
    mask = torch.ones_like(text)
    with torch.no_grad(), base.lora(False):
        here, there = (
            base.read(base.no_prefix(2), base.embed(text), mask, positions_of(mask) + shift, record=12)[1]
            for shift in (0, 7)
        )
    here, there = (torch.stack([keys for keys, _ in keys_values], 1) for keys_values in (here, there))
    back = base.rotate(there, torch.full((1, 12), -7))
    assert (back - here).abs().max() < 1e-4 and (there - here).abs().max() > 1e-2


@every_case
@pytest.mark.parametrize("regime", ["explicit", "parametric"])
def test_without_a_state_and_disabled(family, state_type, regime):
    """No state: base + LoRA answers in explicit, the bare base in parametric; disabled, the bare base."""
    model, query = shared_model(family, state_type=state_type, regime=regime), ids(2, 9)
    expected = bare_base(family)(query).logits
    with torch.no_grad():
        without, state = model(input_ids=query).logits, model.adapt(chunks(1))
        under = model(input_ids=query, task_state=state).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=query).logits, expected)
            with pytest.raises(ValueError, match="disabled"):
                model(input_ids=query, task_state=state)
    assert torch.equal(without, expected) == (regime == "parametric")
    assert (under - without).abs().max() > 1e-4


@every_case
def test_saved_and_loaded(family, state_type, tmp_path):
    model, query = shared_model(family, state_type=state_type), ids(2, 6, seed=3)
    state = model.adapt(chunks(2))
    model.save_pretrained(tmp_path / "adapter")
    state.save_pretrained(tmp_path / "state")
    again = PeftModel.from_pretrained(make_base(family).requires_grad_(False), tmp_path / "adapter").eval()
    loaded = TaskState.from_pretrained(tmp_path / "state")
    with torch.no_grad():
        expected = model(input_ids=query, task_state=state).logits
        assert torch.equal(again(input_ids=query, task_state=loaded).logits, expected)


@every_case
def test_an_episode_trains_everything(family, state_type):
    """Every parameter gets a gradient, and gradient checkpointing changes none."""
    found = []
    for checkpointing in (False, True):
        model = make_model(family, state_type=state_type).train()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        support = torch.stack([chunk["input_ids"] for chunk in chunks(2)], 1)  # (B, K, C)
        query = ids(2, 1, 8, seed=3)
        loss = model(input_ids=query, labels=query, chunk_input_ids=support).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert [n for n, g in gradients.items() if g is None or not g.any()] == []
        found.append((loss.detach(), gradients))
    (loss, gradients), (loss_again, gradients_again) = found
    assert (loss - loss_again).abs() < 1e-6
    for name, gradient in gradients.items():
        assert (gradient - gradients_again[name]).abs().max() < 1e-5 * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("regime", ["parametric"])
@every_case
def test_a_parametric_episode_trains_everything(family, state_type, regime):
    model = make_model(family, state_type=state_type, regime=regime).train()
    query = ids(2, 1, 8, seed=3)
    model(input_ids=query, labels=query, chunk_input_ids=ids(2, 2, 10)).loss.backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []


# Root mean square of the difference in deviations of the logits. Measured: at most 0.014, and the bare base alone has
# 0.005 to 0.013 from rounding to 8 bits; OLMo-hybrid's recurrence multiplies it to 0.054.
BFLOAT16 = {"olmo_hybrid": 0.15}


@every_case
def test_bfloat16_base(family, state_type):
    """State and head stay in float32; answers are those of the same weights in float32."""
    rounded = make_base(family).to(torch.bfloat16)
    model = make_model(make_base(family).to(torch.bfloat16), state_type=state_type)
    exact = make_model(rounded.float(), state_type=state_type)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    query = ids(2, 9, seed=3)
    with torch.no_grad():
        state = model.adapt(chunks(2))
        answer = model(input_ids=query, task_state=state).logits
        expected = exact(input_ids=query, task_state=exact.adapt(chunks(2))).logits
    assert {t.dtype for n, t in state.tensors.items() if n != "kept_age"} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert (answer - expected).square().mean().sqrt() < BFLOAT16.get(family, 0.04) * expected.std()
    assert model.generate(query, task_state=state, max_new_tokens=2, **GREEDY).shape == (2, 11)


@pytest.mark.parametrize(
    ("family", "state_type"), with_marks(NO_KEPT_CASES, lambda family, state: (family, state) == ("llama", "prefix"))
)
def test_compiled_base(family, state_type):
    """`base.compile()`: one graph without breaks; the answers are those of the base as it is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, query = make_model(family, state_type=state_type), ids(2, 9, seed=3)
    with torch.no_grad():
        state = model.adapt(chunks(2))
        expected = model(input_ids=query, task_state=state).logits
        model.base_model.model.compile(backend="eager")
        assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    if family not in GRAPH_BREAKS:
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "state_type"), [("llama", "prefix"), ("llama", "prompt"), ("mamba", "prompt")])
def test_compiled_peft_model(family, state_type):
    """`torch.compile(model)`: identity and ids are checked outside of its graphs."""
    torch._dynamo.reset()
    model, query = make_model(family, state_type=state_type), ids(2, 9, seed=3)
    with torch.no_grad():
        state = model.adapt(chunks(2))
        expected = model(input_ids=query, task_state=state).logits
        found = torch.compile(model, backend="eager")(input_ids=query, task_state=state).logits
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "config", [{"state_type": s} for s in ("prefix", "kept", "delta")], ids=lambda c: c["state_type"]
)
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_refused_by_design(family, config):
    """Layers that are not attention have no keys and values, so there is no prefix."""
    base = make_base(family)
    for more in ({}, {"accumulation": "recent"}):
        if config["state_type"] == "prefix" or not more:
            with pytest.raises(ValueError, match=f"'{base.config.model_type}' does not have: use .*'prompt'"):
                make_model(base, **config, **more)
    assert not any("lora" in name for name, _ in base.named_modules()), "the base was changed"


def padded(texts: list[torch.Tensor], left: bool) -> dict[str, torch.Tensor]:
    width = max(text.shape[1] for text in texts)
    rows = [torch.nn.functional.pad(t, (width - t.shape[1], 0) if left else (0, width - t.shape[1])) for t in texts]
    input_ids = torch.cat(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}


def mask_of_first_row(width: int) -> torch.Tensor:
    return torch.tensor([[1] * width, [0] * width])
