"""Queries under a state: equal to real tokens, padded or not, cached or not."""

import pytest
import torch
from tiny import FAMILIES, MEMBERS, SLOTS, STATES, chunks, ids, make_base, make_model
from transformers import DynamicCache, GenerationConfig

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "state_type", "regime"), MEMBERS)
def test_answers_equal_an_independent_reference(family, state_type, regime, attention):
    """The reference writes the state into transformers' own DynamicCache, or feeds the prompt as embeddings."""
    model = make_model(family, attention, state_type=state_type, regime=regime, correction=state_type == "delta")
    if state_type == "delta":  # what the tensors say is what the base must see
        torch.nn.init.zeros_(model.core.correction.write.weight)
        torch.nn.init.zeros_(model.core.correction.write.bias)
    state, query = model.adapt(chunks(3)), ids(2, 9, seed=1)
    with torch.no_grad(), model.reader.base.lora(regime == "explicit"):
        if state_type != "prompt":
            keys, values = state.tensors["key"], state.tensors["value"]
            if state_type == "kept":
                kept = model.reader.base.rotate(state.tensors["kept_key"], torch.tensor([[2, 3]]))
                keys, values = torch.cat([keys, kept], -2), torch.cat([values, state.tensors["kept_value"]], -2)
            cache = DynamicCache(config=model.config)
            for layer in range(3):
                cache.update(keys[:, layer], values[:, layer], layer)
            expected = model.base_model.model(input_ids=query, past_key_values=cache).logits
        else:
            embedded = model.get_input_embeddings()(query)
            embedded = torch.cat([state.tensors["prompt"][:, 0, 0], embedded], 1)
            expected = model.base_model.model(inputs_embeds=embedded).logits[:, SLOTS:]
    assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-5


def test_generate_samples():
    model = make_model()
    state, query = model.adapt(chunks(2)), ids(2, 6, seed=1)
    sampled = model.generate(
        input_ids=query, task_state=state, max_new_tokens=4, do_sample=True, num_return_sequences=2, pad_token_id=0
    )
    assert sampled.shape == (4, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_state_and_disabled(family):
    query = ids(2, 9)
    base = make_base(family)(query).logits
    explicit = make_model(family)
    assert (explicit(input_ids=query).logits - base).abs().max() > 1e-3, "explicit answers with LoRA on"
    assert torch.equal(make_model(family, regime="parametric")(input_ids=query).logits, base)
    with explicit.disable_adapter():
        assert torch.equal(explicit(input_ids=query).logits, base)
        with pytest.raises(ValueError, match="disabled"):
            explicit(input_ids=query, task_state=explicit.initial_state())
    assert (explicit(input_ids=query).logits - base).abs().max() > 1e-3


def test_loss_is_the_shifted_loss_of_the_query_alone():
    model = make_model()
    state, query = model.adapt(chunks(2)), ids(2, 9, seed=1)
    labels = query.clone()
    labels[:, :4] = -100
    out = model(input_ids=query, labels=labels, task_state=state)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), query[:, 4:].flatten())
    assert (out.loss - expected).abs() < 1e-6


def test_using_nests_and_restores():
    model = make_model()
    first, second, query = model.adapt(chunks(1)), model.adapt(chunks(2)), ids(2, 5, seed=1)
    bare = model(input_ids=query).logits
    with model.using(first):
        assert torch.equal(model(input_ids=query).logits, model(input_ids=query, task_state=first).logits)
        with pytest.raises(RuntimeError), model.using(second):
            assert torch.equal(model(input_ids=query).logits, model(input_ids=query, task_state=second).logits)
            raise RuntimeError
        assert torch.equal(model(input_ids=query).logits, model(input_ids=query, task_state=first).logits)
    assert torch.equal(model(input_ids=query).logits, bare)


def test_state_effect():
    model = make_model(regime="parametric")
    state, query = model.adapt(chunks(2)), {"input_ids": ids(2, 9, seed=1)}
    effect = model.state_effect(state, query)
    with_state = model(**query, labels=query["input_ids"], task_state=state).loss.item()
    without = model(**query, labels=query["input_ids"]).loss.item()
    assert effect["kl"] > 0
    assert effect["loss_difference"] == pytest.approx(with_state - without, abs=1e-5)


@pytest.mark.parametrize("state_type", STATES)
def test_autocast_leaves_the_state_in_float32(state_type):
    model = make_model(state_type=state_type).train()
    query = ids(2, 1, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=query, labels=query, chunk_input_ids=ids(2, 3, 6)).loss
    loss.backward()
    exact = model(input_ids=query, labels=query, chunk_input_ids=ids(2, 3, 6)).loss
    assert (loss - exact).abs() < 0.05


@pytest.mark.parametrize("state_type", [*STATES, "kept"])
def test_bfloat16_base_keeps_a_float32_state(state_type):
    model = make_model(state_type=state_type)
    model.base_model.model.to(torch.bfloat16)
    model.base_model.iai.float()
    state = model.adapt(chunks(2))
    assert all(t.dtype == torch.float32 for n, t in state.tensors.items() if n != "kept_age")
    assert model(input_ids=ids(2, 5), task_state=state).logits.dtype == torch.bfloat16
    assert model.generate(input_ids=ids(2, 5), task_state=state, max_new_tokens=2, **GREEDY).shape == (2, 7)


@pytest.mark.parametrize("state_type", STATES)
def test_the_loss_does_not_see_padding(state_type):
    """Nor does it score a query's first token from a pad before it."""
    model, query = make_model(state_type=state_type), ids(2, 6, seed=1)
    state = model.adapt(chunks(2))
    expected = model(input_ids=query, labels=query, task_state=state).loss
    padded = torch.cat([torch.full((2, 3), 7), query], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    labels = padded.masked_fill(mask == 0, -100)
    found = model(input_ids=padded, attention_mask=mask, labels=labels, task_state=state).loss
    assert (found - expected).abs() < 1e-5
    with pytest.raises(ValueError, match="inputs_embeds cannot be used"):
        model(input_ids=query, inputs_embeds=torch.zeros(2, 6, 32), task_state=state)


def test_arguments_of_transformers_behind_embeddings():
    """A base without keys and values is given embeddings: what counts or cuts positions must not count the prompt."""
    model = make_model("mamba", state_type="prompt")
    state, query = model.adapt(chunks(2)), ids(2, 6, seed=1)
    whole = model(input_ids=query, labels=query, task_state=state)
    assert torch.equal(model(input_ids=query, task_state=state, logits_to_keep=2).logits, whole.logits[:, -2:])
    padded = torch.cat([ids(2, 3, seed=2), query], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    assert (
        model(input_ids=padded, attention_mask=mask, labels=padded, task_state=state).loss - whole.loss
    ).abs() < 1e-5
    places = torch.tensor([1, 3])
    assert torch.equal(model(input_ids=query, task_state=state, logits_to_keep=places).logits, whole.logits[:, places])
    for values in ({"return_dict": False}, {"output_hidden_states": True}):
        with pytest.raises(ValueError, match="'mamba' reads a state, padding and text in another order"):
            model(input_ids=query, task_state=state, **values)
    expected = model.generate(query, task_state=state, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(query, task_state=state, max_length=10, **GREEDY), expected)
    settings = GenerationConfig(max_length=10, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(query, task_state=state, generation_config=settings), expected)
    assert settings.max_length == 10
    output = model.generate(query, task_state=state, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.sequences, expected)
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(2, 6, 32), task_state=state)
