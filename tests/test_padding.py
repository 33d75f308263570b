"""Padding is nowhere: a row of a batch is read, answers and generates as it does alone, on every family.

Windows of sliding layers are shorter than slots, query and padding together. Axes: B rows, T tokens, p padding tokens.
"""

import pytest
import torch
from tiny import ATTENTION_FAMILIES, RECURRENT_FAMILIES, ids, lora_state_model, make_base, make_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoConfig, MistralConfig, Qwen2Config

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
SLIDING = {
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, sliding_window=8, use_sliding_window=True, max_window_layers=1),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_position_embeddings=256,
        attention_types=[[["global", "local"], 1]], window_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    ),
}  # fmt: skip
STATES = ("prefix", "prompt", "lora", "prefix+lora", "attention")
LENGTHS = (14, 9, 3)  # of the rows; the longest and its slots are beyond every window


def base_of(family):
    if family not in SLIDING:
        return make_base(family)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(SLIDING[family]()).eval()
    for parameter in base.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return base


def model_of(family, state_type):
    if state_type == "lora":
        return lora_state_model(base_of(family), state_type="lora", signal="gradients")
    values = {"state_type": state_type}
    if state_type == "attention":
        values = {"state_type": "prefix", "accumulation": "attention"}
    if state_type == "prefix+lora":
        values |= {"state_r": 2}
    return make_model(base_of(family), **values)


def rows_of(lengths=LENGTHS, left=True):
    """ids and mask (B, T) of rows of several lengths, padded on one side."""
    most, text = max(lengths), ids(len(lengths), max(lengths), seed=5)
    mask = torch.stack([torch.cat([torch.zeros(most - n), torch.ones(n)]) for n in lengths]).long()
    mask = mask if left else mask.flip(1)
    return text.masked_fill(mask == 0, 0), mask


def alone(tensors, mask, row):
    """A row without its padding."""
    return tensors[row : row + 1, mask[row] != 0]


CASES = [(f, s) for f in SLIDING for s in STATES if not (f == "gpt_neo" and s in ("attention", "prefix+lora"))]
CASES += [(f, "prefix") for f in ATTENTION_FAMILIES] + [(f, "prompt") for f in RECURRENT_FAMILIES]


def tolerance(family):
    return 2e-2 if family in RECURRENT_FAMILIES else 2e-4


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(("family", "state_type"), CASES)
@torch.no_grad()
def test_rows_answer_and_are_read_as_alone(family, state_type, left):
    model = model_of(family, state_type)
    (text, mask), (chunk, chunk_mask) = rows_of(left=left), rows_of((12, 7, 4), left=left)
    state = model.adapt([{"input_ids": ids(3, 10)}, {"input_ids": chunk, "attention_mask": chunk_mask}])
    labels = text.masked_fill(mask == 0, -100)
    found = model(input_ids=text, attention_mask=mask, labels=labels, task_state=state)
    losses = []
    for row in range(3):
        stream = [{"input_ids": ids(3, 10)[row : row + 1]}, {"input_ids": alone(chunk, chunk_mask, row)}]
        own = model.adapt(stream)
        for name, tensor in own.tensors.items():
            scale = tensor.double().abs().max().clamp_min(1)
            assert (state.tensors[name][row] - tensor[0]).double().abs().max() < tolerance(family) * scale, name
        query = alone(text, mask, row)
        expected = model(input_ids=query, labels=query, task_state=state.select(row))
        logits = alone(found.logits, mask, row)
        assert (logits - expected.logits).abs().max() < tolerance(family) * expected.logits.abs().max().clamp_min(1)
        losses.append(expected.loss * (query.shape[1] - 1))
    assert found.loss == pytest.approx(float(sum(losses)) / (sum(LENGTHS) - 3), rel=1e-3)


@pytest.mark.parametrize(("family", "state_type"), [case for case in CASES if case[0] in SLIDING])
def test_rows_generate_as_alone(family, state_type):
    model = model_of(family, state_type)
    text, mask = rows_of()
    state = model.adapt([{"input_ids": ids(3, 10)}])
    for options in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"max_length": 17}):
        few = {"do_sample": False} | ({} if "max_length" in options else {"max_new_tokens": 3}) | options
        found = model.generate(text, attention_mask=mask, task_state=state, **few)
        several = options.get("num_return_sequences", 1)
        assert found.shape == (3 * several, 17)
        for row in range(3):
            few |= {"max_new_tokens": 3}
            few.pop("max_length", None)
            own = model.generate(alone(text, mask, row), task_state=state.select(row), **few)
            assert torch.equal(found[row * several : (row + 1) * several, 14:], own[:, -3:])


def test_rows_are_moved_only_where_a_window_is_too_short():
    model = model_of("mistral", "prefix")
    base = model.base_model.reader.base
    _, mask = rows_of((2, 1))
    assert base.packing(mask, 6) is None and base.packing(mask, 7) is not None  # the window is 8
    assert base.packing(rows_of(left=False)[1], 99) is None
    assert model_of("qwen2", "lora").base_model.reader.base.packing(mask, 7) is not None
    assert make_model().base_model.reader.base.packing(mask, 10**6) is None


def test_what_would_show_places_is_refused_where_they_are_moved():
    model = model_of("mistral", "prefix")
    (text, mask), state = rows_of(), model.adapt([{"input_ids": ids(3, 10)}])
    for values in ({"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}):
        with pytest.raises(ValueError, match=f"in another order, which.*{next(iter(values))}"):
            model(input_ids=text, attention_mask=mask, task_state=state, **values)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(text, attention_mask=mask, task_state=state, return_dict_in_generate=True, max_new_tokens=2)
    few = {"attention_mask": mask, "task_state": state, "do_sample": False}
    with pytest.raises(ValueError, match="max_length=14, but the prompts have 14 tokens"):
        model.generate(text, max_length=14, **few)
    config = model.get_base_model().generation_config
    config.pad_token_id, config.eos_token_id = None, 5  # as transformers does, the end of text then pads
    assert model.generate(text, max_new_tokens=2, **few)[2, : 14 - LENGTHS[2]].unique().tolist() == [5]
    last = model(input_ids=text, attention_mask=mask, task_state=state, logits_to_keep=2).logits
    every = model(input_ids=text, attention_mask=mask, task_state=state).logits
    assert torch.equal(last, every[:, -2:])
