"""Bad input: each a clear error that names the value and what was expected."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftConfig, get_peft_model
from tiny import SLOTS, VOCAB, WINDOW, chunks, ids, make_base, make_model
from transformers import BatchEncoding

from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments, evaluate_curve, vector_base
from hf_iai.objectives import Objective

CAUSAL = {"task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"regime": "implicit", "state_type": "lora"},
            "state_type='lora' has no meaning for regime='implicit': leave it",
        ),
        ({"regime": "implicit", "num_state_tokens": 4}, "num_state_tokens=4 has no meaning for .*: leave it None"),
        ({"regime": "implicit", "prediction": "magic"}, "prediction must be one of .*'magic'"),
        (
            {"prediction": "logits"},
            "prediction='logits' has no meaning .*: leave it None; it is for regime='implicit'",
        ),
        ({"regime": "magic"}, "regime must be one of .*'magic'"),
        ({"state_type": "linear"}, "'linear' and task_type='SEQ_CLS' need each other, .* task_type='CAUSAL_LM'"),
        ({"task_type": "SEQ_CLS"}, "need each other, got state_type='prefix' and task_type='SEQ_CLS'"),
        (
            {"pooling": "cls"},
            "pooling='cls' has no meaning .*: leave it 'mean'; it is for state_type='linear'",
        ),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' is not available yet"),
        ({"state_type": "x"}, "state_type must be one of"),
        ({"signal": "magic"}, "signal must be one of"),
        ({"head": "sgd"}, r"signal='observations' has the heads \['gated'\], got head='sgd'"),
        ({"head": "gated", "signal": "gradients"}, r"has the heads \['learned_optimizer', .*got head='gated'"),
        (
            {"second_order": True},
            "second_order=True has no meaning .*'observations'.*: leave it False; it is for",
        ),
        (
            {"signal": "gradients", "accumulation": "recent"},
            "accumulation='recent' has no meaning .*; it is for head='gated'",
        ),
        ({"signal": "both", "num_kept_tokens": 2}, "got signal='both' with 'average' and 2"),
        (
            {"signal": "gradients", "delta_rule": True},
            "got signal='gradients' with 0 and True: leave them out",
        ),
        ({"signal": "both", "correction": False}, "signal='both' uses gradients in the correction"),
        ({"signal": "gradients", "initial_rate": 0.0}, "initial_rate must be above 0"),
        (
            {"signal": "both", "initial_rate": 0.1},
            "initial_rate=0.1 has no meaning .*; it is for signal='gradients'",
        ),
        ({"signal": "gradients", "head": "path_aware", "path_window": 0}, "path_window must be at least 1, got 0"),
        (
            {"learned_optimizer": {"hidden": 8}},
            "{'hidden': 8} has no meaning .*; it is for head='learned_optimizer'",
        ),
        (
            {"signal": "gradients", "head": "sgd", "learned_optimizer": {"hidden": 8}},
            "has no meaning .*head='sgd': leave it None; it is for head='learned_optimizer'",
        ),
        ({"state_type": "lora", "state_r": 0}, "state_r must be at least 1, got 0"),
        ({"state_type": "lora", "accumulation": "recent"}, "keeps tokens, which state_type='lora' cannot"),
        ({"accumulation": "overwrite"}, "accumulation must be one of"),
        ({"num_state_tokens": 0}, "num_state_tokens must be at least 1, got 0"),
        ({"num_kept_tokens": 16}, "from 0 to num_state_tokens - 1 = 15, got 16"),
        (
            {"num_kept_tokens": 4, "state_type": "prompt"},
            "=4 has no meaning .*it is for state_type='prefix'",
        ),
        (
            {"num_kept_tokens": 4, "accumulation": "recent"},
            "needs accumulation='average', got 'recent'",
        ),
        (
            {"delta_rule": True, "state_type": "prompt"},
            "=True has no meaning .*it is for state_type='prefix'",
        ),
        ({"delta_rule": True, "accumulation": "recent"}, "delta_rule=True needs .*got 'recent' and True"),
        ({"delta_rule": True, "correction": False}, "delta_rule=True needs .*got 'average' and False"),
        ({"state_r": 3}, "state_r=3 has no meaning for state_type='prefix'.*leave it 8; it is for state_type='lora'"),
        ({"path_window": 9}, "path_window=9 has no meaning .*head='gated': leave it 5; it is for head='path_aware'"),
        ({"state_target_modules": ["x"]}, r"state_target_modules=\['x'\] has no meaning for state_type='prefix'"),
        (
            {"fit_intercept": False},
            "fit_intercept=False .*it is for state_type='linear' with likelihood",
        ),
        ({"signal": "gradients", "correction": False}, "correction=False has no meaning .*it is for head='gated'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"pin_bos": True, "state_type": "lora"}, "pin_bos=True needs state_type='prefix' or 'prompt', got 'lora'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM' is not available yet"),
        ({"task_type": None}, "task_type must be one of .*None"),
    ],
)
def test_configuration(values, message):
    with pytest.raises(ValueError, match=message):
        IAIConfig(**(CAUSAL | values))


@pytest.mark.parametrize(
    "values",
    [
        {"state_r": 3},
        {"state_r": 3, "path_window": 9, "state_target_modules": ["x"]},
        {"state_type": "linear", "task_type": "SEQ_CLS", "state_r": 3},
        {"regime": "implicit", "state_r": 3},
    ],
)
def test_an_adapter_saved_with_an_unused_field_still_loads(values, tmp_path):
    """Earlier versions accepted such fields: what they saved loads, with a warning, and means the same."""
    plain = {name: value for name, value in values.items() if name in ("state_type", "task_type", "regime")}
    config = IAIConfig(**(CAUSAL | plain))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | values))
    first = next(name for name in values if name not in plain)
    with pytest.warns(UserWarning, match=f"a field that is not used: {first}="):
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.state_type == config.state_type and loaded.regime == config.regime


@pytest.mark.parametrize(
    "copied", [replace, lambda config, **values: IAIConfig(**(config.to_dict() | values))], ids=["replace", "dict"]
)
def test_a_copied_configuration_is_checked_like_a_new_one(copied):
    text, linear = IAIConfig(**CAUSAL), IAIConfig(task_type="SEQ_CLS", state_type="linear")
    assert copied(text, num_state_tokens=8).num_state_tokens == 8
    with pytest.raises(ValueError, match="num_kept_tokens=3 has no meaning for state_type='linear'"):
        copied(linear, num_kept_tokens=3)
    with pytest.raises(ValueError, match="has no meaning for regime='implicit'"):
        copied(text, regime="implicit")


@pytest.mark.parametrize(
    "given", ["def f(): pass", ["one text", "another"], [3], iter(["x"])], ids=["text", "texts", "numbers", "stream"]
)
def test_text_in_place_of_chunks_says_what_a_chunk_is(given):
    model = make_model()
    with pytest.raises(ValueError, match=r"a chunk is a mapping with input_ids.*chunk_text\(text, tokenizer"):
        model.adapt(given)


def test_one_mapping_is_a_single_chunk():
    """Such as a tokenizer's output."""
    model, chunk = make_model(), {"input_ids": ids(1, 9)}
    same = model.adapt([chunk])
    lists = {"input_ids": chunk["input_ids"].tolist(), "attention_mask": [[1] * 9]}
    flat = {"input_ids": chunk["input_ids"][0].tolist()}
    for given in (BatchEncoding(chunk), BatchEncoding(lists), flat, [lists]):
        one = model.adapt(given)
        assert int(one.step) == 1
        assert all(torch.equal(t, same.tensors[name]) for name, t in one.tensors.items())


def test_a_state_shows_itself_in_one_line():
    state = make_model().adapt(chunks(3))
    shown = repr(state)
    assert "\n" not in shown and len(shown) < 200
    assert all(part in shown for part in ("average", "tasks=2", "chunks=3", "tokens=30", f"bytes={state.nbytes}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": -5}, "batch_size=-5 has no meaning for this model's curve: leave it out"),
        ({"static_model": "nonsense"}, "static_model='nonsense' has no meaning for this model's curve"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"tokenizer": "a tokenizer"}, "tokenizer='a tokenizer' has no meaning"),
    ],
)
def test_options_of_a_curve_that_mean_nothing(options, message):
    config = IAIConfig(task_type="SEQ_CLS", state_type="linear", likelihood="gaussian")
    model = get_peft_model(vector_base(3), config)
    rows = [{"vector": [1.0, 0.0, float(i)], "label": float(i)} for i in range(4)]
    with pytest.raises(ValueError, match=message):
        evaluate_curve(model, [{"support": rows, "query": rows}], (1,), **({"chunk_size": 2} | options))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0.9}, r"has the settings \['momentum_decays', .*got \['decay'\]: leave them out"),
        ({"momentum_decays": [0.9, 1.0]}, r"momentum_decays must be at least one decay from 0 .*got \(0.9, 1.0\)"),
        ({"momentum_decays": 0.9}, "momentum_decays must be at least one decay .*got 0.9"),
        ({"second_decays": []}, r"second_decays must be .*got \(\): leave it out for the default, \(0.9, 0.999\)"),
        ({"factored_decay": -0.1}, "factored_decay must be a decay from 0 to below 1, got -0.1"),
        ({"times": [3, 0]}, r"times must be at least one number above 0, got \(3, 0\)"),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, got 0"),
        ({"step_size": "much"}, "step_size must be a number above 0, got 'much'"),
        ({"smallest_rms": True}, "smallest_rms must be a number above 0, got True"),
    ],
)
def test_settings_of_the_learned_optimizer(settings, message):
    with pytest.raises(ValueError, match=message):
        IAIConfig(**CAUSAL, signal="gradients", learned_optimizer=settings)


def test_pin_bos_without_bos_token():
    base = make_base()
    base.config.bos_token_id = None
    with pytest.raises(ValueError, match="has no bos_token_id"):
        get_peft_model(base, IAIConfig(**CAUSAL, accumulation="recent", pin_bos=True))


def test_reading():
    model = make_model()
    with pytest.raises(ValueError, match="no chunk.*initial_state"):
        model.adapt([])
    room = WINDOW - 2 * SLOTS
    model.adapt([{"input_ids": ids(1, room)}])
    with pytest.raises(ValueError, match=f"{room + 1} tokens.*{WINDOW} - 2 x {SLOTS} slots = {room}"):
        model.adapt([{"input_ids": ids(1, room + 1)}])
    with pytest.raises(ValueError, match=f"5..{VOCAB} do not fit a vocabulary of {VOCAB}"):
        model.adapt([{"input_ids": torch.tensor([[5, VOCAB]])}])
    with pytest.raises(ValueError, match="state of 2 tasks cannot read a chunk of 3 rows"):
        model.adapt(chunks(1, batch=3), state=model.adapt(chunks(1, batch=2)))
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        model.adapt([{"input_ids": ids(7)}])
    with pytest.raises(ValueError, match="parallel must be at least 1, got 0"):
        model.adapt(chunks(1), parallel=0)
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        model.adapt(chunks(1))


def test_answering():
    model = make_model()
    state, room = model.adapt(chunks(1)), WINDOW - SLOTS
    assert model(input_ids=ids(2, room), task_state=state).logits.shape[1] == room
    with pytest.raises(ValueError, match=f"{room + 1} tokens.*{WINDOW} - {SLOTS} slots = {room}"):
        model(input_ids=ids(2, room + 1), task_state=state)
    with pytest.raises(ValueError, match="state of 2 tasks with 3 queries"):
        model(input_ids=ids(3, 5), task_state=state)
    with pytest.raises(ValueError, match="do not fit a vocabulary"):
        model(input_ids=torch.full((2, 4), VOCAB), task_state=state)


def test_episodes_that_do_not_fit():
    model, query = make_model(), ids(1, 1, 5)
    with pytest.raises(ValueError, match=f"chunk of {WINDOW} tokens"):
        model(input_ids=query, labels=query, chunk_input_ids=ids(1, 1, WINDOW))
    with pytest.raises(ValueError, match=f"query of {WINDOW} tokens"):
        model(input_ids=ids(1, 1, WINDOW), chunk_input_ids=ids(1, 1, 5))
    with pytest.raises(ValueError, match="not both"):
        model(input_ids=query, chunk_input_ids=ids(1, 1, 5), task_state=model.initial_state())


def test_what_peft_offers_and_iai_cannot():
    model = make_model()
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            call()
    with pytest.raises(ValueError, match="cannot be added"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=ids(2, 5), adapter_names=["default", "default"])


def test_training_arguments(tmp_path):
    for values, message in [
        ({"objective": "magic"}, "objective must be one of"),
        ({"max_chunks": -1}, "max_chunks must be at least 0"),
        ({"max_chunks": 4, "min_chunks": 5}, "min_chunks must lie in 1..max_chunks = 4, got 5"),
        ({"scored_states": "first"}, "scored_states must be one of .*'first'"),
        (
            {"scored_states": "last", "objective": "greedy"},
            "scored_states='last' needs objective='unrolled'",
        ),
        (
            {"scored_states": "next", "objective": "truncated"},
            "scored_states='next' needs objective='unrolled'",
        ),
        ({"max_chunks": 4, "min_chunks": 4}, "halve_chunks=0.25 leaves the earlier halves out"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"curriculum": 2.0}, "curriculum must lie in 0..1"),
        ({"state_learning_rate": 0.0}, "state_learning_rate must be above 0"),
        ({"remove_unused_columns": True}, "leave it False"),
    ]:
        with pytest.raises(ValueError, match=message):
            IAITrainingArguments(output_dir=str(tmp_path), **values)
    with pytest.raises(ValueError, match="window must be at least 1"):
        Objective("truncated", window=0)


def test_trainer(tmp_path):
    args = IAITrainingArguments(output_dir=str(tmp_path), report_to=[])
    with pytest.raises(ValueError, match="processing_class is missing"):
        IAITrainer(make_model(), args)
    with pytest.raises(ValueError, match="needs an IAI adapter"):
        IAITrainer(make_base(), args)
    with pytest.raises(ValueError, match="pass one of the two"):
        IAITrainer(make_model(), args, peft_config=IAIConfig(**CAUSAL))
