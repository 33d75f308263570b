"""Bad input: each a clear error that names the value and what was expected."""

import pytest
import torch
from peft import get_peft_model
from tiny import SLOTS, VOCAB, WINDOW, chunks, ids, make_base, make_model

from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments
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
        ({"prediction": "logits"}, "prediction='logits' needs regime='implicit', got regime='explicit'"),
        ({"regime": "magic"}, "regime must be one of .*'magic'"),
        ({"state_type": "linear"}, "'linear' and task_type='SEQ_CLS' need each other, .* task_type='CAUSAL_LM'"),
        ({"task_type": "SEQ_CLS"}, "need each other, got state_type='prefix' and task_type='SEQ_CLS'"),
        ({"pooling": "cls"}, "pooling='cls' needs state_type='linear', got 'prefix'"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' is not available yet"),
        ({"state_type": "x"}, "state_type must be one of"),
        ({"signal": "magic"}, "signal must be one of"),
        ({"head": "sgd"}, r"signal='observations' has the heads \['gated'\], got head='sgd'"),
        ({"head": "gated", "signal": "gradients"}, r"has the heads \['learned_optimizer', .*got head='gated'"),
        ({"second_order": True}, "second_order=True needs signal='gradients' or 'both', got signal='observations'"),
        (
            {"signal": "gradients", "accumulation": "recent"},
            "need signal='observations', got signal='gradients' with 'rec",
        ),
        ({"signal": "both", "num_kept_tokens": 2}, "got signal='both' with 'average' and 2"),
        ({"signal": "gradients", "delta_rule": True}, "delta_rule=True needs signal='observations' or 'both'"),
        ({"signal": "both", "correction": False}, "signal='both' uses gradients in the correction"),
        ({"signal": "gradients", "initial_rate": 0.0}, "initial_rate must be above 0"),
        ({"signal": "both", "initial_rate": 0.1}, "initial_rate must .*with signal='gradients', got 0.1 with 'both'"),
        ({"signal": "gradients", "path_window": 0}, "path_window must be at least 1, got 0"),
        ({"learned_optimizer": {"hidden": 8}}, "{'hidden': 8} needs head='learned_optimizer', got head='gated'"),
        (
            {"signal": "gradients", "head": "sgd", "learned_optimizer": {"hidden": 8}},
            "needs head='learned_optimizer', got head='sgd'",
        ),
        ({"state_type": "lora", "state_r": 0}, "state_r must be at least 1, got 0"),
        ({"state_type": "lora", "accumulation": "recent"}, "keeps tokens, which state_type='lora' cannot"),
        ({"accumulation": "overwrite"}, "accumulation must be one of"),
        ({"num_state_tokens": 0}, "num_state_tokens must be at least 1, got 0"),
        ({"num_kept_tokens": 16}, "from 0 to num_state_tokens - 1 = 15, got 16"),
        ({"num_kept_tokens": 4, "state_type": "prompt"}, "num_kept_tokens=4 needs state_type='prefix'"),
        ({"num_kept_tokens": 4, "accumulation": "recent"}, "'average', got 'prefix' and 'recent'"),
        ({"delta_rule": True, "state_type": "prompt"}, "delta_rule=True needs .*got 'prompt', 'average' and True"),
        ({"delta_rule": True, "accumulation": "recent"}, "got 'prefix', 'recent' and True"),
        ({"delta_rule": True, "correction": False}, "got 'prefix', 'average' and False"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"pin_bos": True}, "pin_bos=True needs accumulation='recent'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM' is not available yet"),
        ({"task_type": None}, "task_type must be one of .*None"),
    ],
)
def test_configuration(values, message):
    with pytest.raises(ValueError, match=message):
        IAIConfig(**(CAUSAL | values))


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
