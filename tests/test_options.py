"""Options of transformers: each one works or is refused in words, as docs/options.md lists them."""

import re
from pathlib import Path

import pytest
import torch
from samples import arguments, episodes, tokenizer
from tiny import chunks, ids, make_base, make_model
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    TextStreamer,
    Trainer,
    TrainingArguments,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria

from hf_iai import IAITrainer

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
WORKS, REFUSED = "works", "refused"
CURVE = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "eval_chunks": (0, 2)}
BEST = CURVE | {"metric_for_best_model": "eval_loss_at_chunks_2", "greater_is_better": False}
QUERY = ids(2, 6, seed=3)
GREEDY = {"do_sample": False, "max_new_tokens": 4}

TRAINING = {  # option -> arguments of IAITrainingArguments, keywords of IAITrainer, works or refused
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, {}, WORKS),
    "max_grad_norm": ({"max_grad_norm": 0.1}, {}, WORKS),
    "bf16_full_eval": ({"bf16_full_eval": True} | CURVE, {}, WORKS),
    "fp16_full_eval": ({"fp16_full_eval": True} | CURVE, {}, WORKS),
    "prediction_loss_only": ({"prediction_loss_only": True} | CURVE, {}, WORKS),
    "eval_accumulation_steps": ({"eval_accumulation_steps": 1} | CURVE, {"compute_metrics": "rows"}, WORKS),
    "eval_do_concat_batches": ({"eval_do_concat_batches": False} | CURVE, {"compute_metrics": "rows"}, WORKS),
    "compute_metrics": (CURVE, {"compute_metrics": "rows"}, WORKS),
    "preprocess_logits_for_metrics": (
        CURVE,
        {"compute_metrics": "rows", "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
        WORKS,
    ),
    "load_best_model_at_end": ({"load_best_model_at_end": True} | BEST, {}, WORKS),
    "EarlyStoppingCallback": (
        {"load_best_model_at_end": True, "learning_rate": 0.0} | BEST,
        {"callbacks": [EarlyStoppingCallback(2)]},
        WORKS,
    ),
    "model_init": ({}, {"model": None, "model_init": lambda trial: make_model()}, WORKS),
    "dataloader_num_workers": ({"dataloader_num_workers": 1}, {}, WORKS),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, {}, WORKS),
    "save_only_model": ({"save_only_model": True}, {}, WORKS),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, {}, REFUSED),
    "TrainingArguments": (None, {}, REFUSED),
    "peft_config with model_init": ({}, {"model": None, "model_init": make_base, "peft_config": True}, REFUSED),
}

FORWARD = {  # option -> values, works or refused
    "output_hidden_states": ({"output_hidden_states": True}, WORKS),
    "output_attentions": ({"output_attentions": True}, WORKS),
    "return_dict": ({"return_dict": False}, WORKS),
    "logits_to_keep": ({"logits_to_keep": 1}, WORKS),
    "use_cache": ({"use_cache": True}, WORKS),
    "past_key_values": ({"past_key_values": "a cache"}, REFUSED),
    "position_ids": ({"position_ids": torch.arange(6)[None]}, REFUSED),
    "cache_position": ({"cache_position": torch.arange(6)}, REFUSED),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(2, 6, 32)}, REFUSED),
}

GENERATE = {  # option -> values, works or refused
    "inputs": ({"input_ids": None, "inputs": QUERY}, WORKS),
    "attention_mask": ({"attention_mask": torch.ones_like(QUERY)}, WORKS),
    "num_beams": ({"num_beams": 3}, WORKS),
    "do_sample": ({"do_sample": True, "top_k": 1}, WORKS),
    "num_return_sequences": ({"do_sample": True, "num_return_sequences": 2}, WORKS),
    "generation_config": ({"generation_config": GenerationConfig(max_new_tokens=4)}, WORKS),
    "max_length": ({"max_new_tokens": None, "max_length": 10}, WORKS),
    "min_new_tokens": ({"min_new_tokens": 4}, WORKS),
    "repetition_penalty": ({"repetition_penalty": 1.5}, WORKS),
    "stopping_criteria": ({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(10)])}, WORKS),
    "logits_processor": ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 2, "cpu")])}, WORKS),
    "return_dict_in_generate": ({"return_dict_in_generate": True, "output_scores": True}, WORKS),
    "streamer": ({"input_ids": QUERY[:1], "streamer": TextStreamer(tokenizer())}, WORKS),
    "past_key_values": ({"past_key_values": "a cache"}, REFUSED),
    "inputs_embeds": ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 32)}, REFUSED),
    "input_ids with inputs": ({"inputs": QUERY}, REFUSED),
    "cache_implementation": ({"cache_implementation": "static"}, REFUSED),
}


def test_the_page_lists_what_is_tested():
    found = dict(re.findall(r"^\| `([^`]+)` \| (works|refused)", PAGE.read_text(), re.MULTILINE))
    tested = {f"{name}": kind for name, (*_, kind) in TRAINING.items()}
    tested |= {f"forward({name})": kind for name, (_, kind) in FORWARD.items()}
    tested |= {f"generate({name})": kind for name, (_, kind) in GENERATE.items()}
    assert found == tested


@pytest.mark.parametrize("name", TRAINING)
def test_training(tmp_path, name):
    values, keywords, kind = TRAINING[name]
    keywords = {"model": "make", "eval_dataset": episodes(6)} | keywords
    if keywords["model"] == "make":
        keywords["model"] = make_model()
    rows = []
    if keywords.get("compute_metrics") == "rows":
        keywords["compute_metrics"] = lambda found: rows.append(len(found.predictions)) or {"rows": rows[-1]}
    if keywords.get("peft_config"):
        keywords["peft_config"] = make_model().active_peft_config

    def train():
        args = arguments(tmp_path, per_device_eval_batch_size=4, **({"max_steps": 4, "save_steps": 2} | values))
        trainer = IAITrainer(args=args, train_dataset=episodes(8), processing_class=tokenizer(), **keywords)
        return trainer, trainer.train()

    if kind == REFUSED:
        if values is None:
            plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
            with pytest.raises(ValueError, match="IAITrainingArguments"):
                IAITrainer(keywords["model"], plain, processing_class=tokenizer())
            return
        with pytest.raises(ValueError, match=name.split()[0]):
            train()
        return
    trainer, result = train()
    assert result.training_loss > 0
    if name == "EarlyStoppingCallback":
        assert trainer.state.global_step == 3
    if name == "load_best_model_at_end":
        assert trainer.state.best_metric is not None
    if "compute_metrics" in keywords:
        assert rows and set(rows) == {6 if name != "eval_do_concat_batches" else 2}  # episodes, or batches of them


def test_metrics_see_all_queries_whatever_their_lengths(tmp_path):
    rows = [row for row in episodes(6)]
    for number, row in enumerate(rows):
        row["query"] = [{"input_ids": query["input_ids"][: 3 + number % 4]} for query in row["query"]] * (
            1 + number % 2
        )
    seen = []
    trainer = IAITrainer(
        make_model(), arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=rows,
        processing_class=tokenizer(), compute_metrics=lambda found: seen.append(found) or {},
    )  # fmt: skip
    trainer.evaluate()
    found = trainer.predict(rows)
    for predictions, labels in ((seen[0].predictions, seen[0].label_ids), (found.predictions, found.label_ids)):
        assert predictions.shape[:2] == labels.shape[:2] == (6, 2) and predictions.shape[2] == labels.shape[2]
        assert (labels != -100).sum(-1).max(-1).tolist() == [len(r["query"][0]["input_ids"]) for r in rows]
    alone = IAITrainer(make_model(), arguments(tmp_path), processing_class=tokenizer()).predict(rows[:1]).predictions
    size = alone.shape
    assert abs(found.predictions[:1, : size[1], : size[2]] - alone).max() < 1e-4


@pytest.fixture(scope="module")
def model():
    model = make_model(attention="eager")  # which tells its weights
    return model, model.adapt(chunks(2, batch=1))


@pytest.mark.parametrize("name", FORWARD)
@torch.no_grad()
def test_forward(model, name):
    (model, state), (values, kind) = model, FORWARD[name]
    if kind == REFUSED:
        with pytest.raises(ValueError, match=name):
            model(input_ids=QUERY, task_state=state, **values)
        return
    expected = model(input_ids=QUERY, task_state=state).logits
    found = model(input_ids=QUERY, task_state=state, **values)
    logits = found[0] if isinstance(found, tuple) else found.logits
    torch.testing.assert_close(logits, expected[:, -logits.shape[1] :], atol=1e-5, rtol=1e-5)
    assert logits.shape[1] == (1 if name == "logits_to_keep" else 6)
    if name.startswith("output"):
        assert len(getattr(found, name.removeprefix("output_"))) >= 3


@pytest.mark.parametrize("name", GENERATE)
def test_generate(model, name):
    (model, state), (values, kind) = model, GENERATE[name]
    options = {"input_ids": QUERY} | GREEDY | {"task_state": state} | values
    if kind == REFUSED:
        with pytest.raises(ValueError, match=name.split()[0]):
            model.generate(**options)
        return
    if "generation_config" in options:
        del options["max_new_tokens"]
    found = model.generate(**options)
    found = getattr(found, "sequences", found)
    rows = 1 if name == "streamer" else 2 * (2 if name == "num_return_sequences" else 1)
    assert len(found) == rows and 6 < found.shape[1] <= 10
    if name not in ("num_beams", "num_return_sequences", "repetition_penalty", "min_new_tokens", "logits_processor"):
        expected = model.generate(input_ids=QUERY, task_state=state, **GREEDY)[: len(found)]
        assert torch.equal(found, expected[:, : found.shape[1]])


def test_a_given_configuration_is_completed_from_the_models_own(model):
    model, state = model
    own = model.get_base_model().generation_config
    own.num_beams = 3
    try:
        found = model.generate(input_ids=QUERY, task_state=state, generation_config=GenerationConfig(max_new_tokens=4))
        own.num_beams = 1
        expected = model.generate(input_ids=QUERY, task_state=state, num_beams=3, max_new_tokens=4)
    finally:
        own.num_beams = 1
    assert torch.equal(found, expected)


def test_padding_is_found_without_a_mask(model):
    model, state = model
    pad = model.get_base_model().generation_config.pad_token_id
    padded = torch.cat([torch.full((2, 3), pad), QUERY], 1)
    alone = model.generate(input_ids=QUERY, task_state=state, **GREEDY)[:, 6:]
    assert torch.equal(model.generate(input_ids=padded, task_state=state, **GREEDY)[:, 9:], alone)
    # A token that also ends texts says nothing about padding.
    found = model.generate(input_ids=padded, task_state=state, eos_token_id=pad, **GREEDY)[:, 9:]
    everything = {"attention_mask": torch.ones_like(padded), "eos_token_id": pad}
    assert torch.equal(found, model.generate(input_ids=padded, task_state=state, **everything, **GREEDY)[:, 9:])


def test_a_lost_process_is_one_message(tmp_path, monkeypatch):
    def lost(self, *args, **kwargs):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr(Trainer, "train", lost)
    trainer = IAITrainer(make_model(), arguments(tmp_path), train_dataset=episodes(4), processing_class=tokenizer())
    with pytest.raises(RuntimeError, match="another process of this training has ended"):
        trainer.train()
