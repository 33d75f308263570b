"""The linear state: four families of encoders read labelled texts and are a classifier after each chunk."""

import json
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from safetensors import safe_open
from samples import BYTES, QUERIES, ROWS, VERBS
from tiny import ENCODERS, make_base, make_classifier, make_encoder
from transformers import AutoModelForSequenceClassification

from hf_iai import (
    IAIConfig,
    IAITrainer,
    IAITrainingArguments,
    LabelledEpisodeCollator,
    TaskState,
    batch_chunks,
    chunk_examples,
    episodes_from_labels,
    export_classifier,
    export_to_peft,
)


@pytest.fixture(scope="module")
def model():
    return make_classifier()


def chunks(rows=ROWS, size=5):
    return list(chunk_examples(rows, BYTES, chunk_size=size))


@torch.no_grad()
def logits(model, state, queries=QUERIES):
    return model(**queries, task_state=state).logits


def assert_same(one: TaskState, other: TaskState, atol=1e-4):
    assert one.class_names == other.class_names
    assert torch.equal(one.step, other.step) and torch.equal(one.num_tokens, other.num_tokens)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], atol=atol, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_batch_is_its_tasks_and_padding_is_nothing(family):
    model = make_classifier(family)
    streams = chunks(), chunks(ROWS[5:9] * 2, size=3)  # 4 classes and 5 chunks; 4 classes, other names first, 3 chunks
    alone = [model.adapt(stream) for stream in streams]
    together = model.adapt(batch_chunks(streams))
    for task, state in enumerate(alone):
        assert_same(together.select(task), state)
    assert_same(TaskState.stack(alone), together)
    assert_same(model.adapt(streams[0], parallel=3), alone[0])
    queries = {name: t.repeat(2, 1) for name, t in QUERIES.items()}
    both = logits(model, together, queries)
    for state, found in zip(alone, both.chunk(2), strict=True):
        torch.testing.assert_close(found, logits(model, state), atol=1e-3, rtol=1e-4)
        for row, expected in enumerate(found):
            length = int(QUERIES["attention_mask"][row].sum())
            single = {name: t[row : row + 1, :length] for name, t in QUERIES.items()}
            torch.testing.assert_close(logits(model, state, single)[0], expected, atol=1e-3, rtol=1e-4)
            left = {name: torch.nn.functional.pad(t, (4, 0)) for name, t in single.items()}
            torch.testing.assert_close(logits(model, state, left)[0], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("family", "regime"), zip(ENCODERS, ["parametric", "explicit"] * 2, strict=True))
def test_saved_and_loaded_is_the_same(family, regime, tmp_path):
    base = make_encoder(family)
    base.base_model.save_pretrained(tmp_path / "base")  # an encoder: its classifier is drawn anew at every loading
    model = make_classifier(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), regime=regime)
    state = model.adapt(chunks())
    model.save_pretrained(tmp_path / "adapter")
    state.save_pretrained(tmp_path / "state")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    again = TaskState.from_pretrained(tmp_path / "state")
    assert again.label_names == state.label_names == tuple(VERBS)
    assert (logits(loaded, again) - logits(model, state)).abs().max() == 0
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        ours = [name.startswith("base_model.iai.head.") or (".lora_" in name) for name in file.keys()]  # noqa: SIM118
    assert all(ours) and (len(ours) > 8) == (regime == "explicit")  # the head has 8, the reader its own
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] is None
    assert not [n for n, p in model.named_parameters() if p.requires_grad and ("classifier" in n or "pooler" in n)]


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize(("pooling", "regime"), [("mean", "parametric"), ("cls", "explicit")])
def test_an_export_is_a_plain_classifier_with_the_same_logits(family, pooling, regime, tmp_path):
    model = make_classifier(family, pooling=pooling, regime=regime)
    state = model.adapt(chunks())
    export_classifier(model, state, tmp_path / "plain", tokenizer=BYTES)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert type(plain) is type(model.get_base_model())
    with torch.no_grad():
        torch.testing.assert_close(plain(**QUERIES).logits, logits(model, state), atol=2e-4, rtol=1e-5)
    assert plain.config.id2label == dict(enumerate(VERBS)) and plain.config.label2id["dog"] == 1
    assert "A classifier of 4 labels" in (tmp_path / "plain" / "README.md").read_text()
    assert (logits(model, state) - logits(model, model.adapt(chunks()))).abs().max() == 0  # the model is as it was
    export_classifier(model, state, tmp_path / "plain")  # in place of the earlier one
    (tmp_path / "plain" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes.txt'"):
        export_classifier(model, state, tmp_path / "plain")


def test_untrained_it_is_a_logistic_regression_from_the_nearest_class_mean():
    base, model = make_encoder("roberta"), make_classifier("roberta", trained=False)

    @torch.no_grad()
    def features(texts):
        inputs = BYTES(texts, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (base.base_model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.layer_norm(pooled, pooled.shape[1:], eps=0) / pooled.shape[1] ** 0.5

    means = torch.stack([features([r["text"] for r in ROWS if r["label"] == name]).mean(0) for name in VERBS])
    x, y = features([r["text"] for r in ROWS]), torch.tensor([list(VERBS).index(r["label"]) for r in ROWS])
    fitted = torch.zeros(len(means), means.shape[1] + 1, requires_grad=True)

    def scores(x):
        return x @ (15 * means + fitted[:, :-1]).T - 7.5 * means.square().sum(1) + fitted[:, -1]

    def loss():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(scores(x), y, reduction="sum")
        loss = loss + 3.84 / means.shape[1] / 2 * fitted.square().sum()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([fitted], max_iter=1000, tolerance_grad=1e-7, line_search_fn="strong_wolfe")
    optimizer.step(loss)
    queries = features([BYTES.decode(row, skip_special_tokens=True) for row in QUERIES["input_ids"]])
    read = model.adapt(chunks())  # at most 32 examples of a class
    for _ in range(30):  # to the minimum
        read = replace(
            read, tensors=read.tensors | {"fitted": model.core.head._fit(read.tensors, torch.tensor([True]))}
        )
    torch.testing.assert_close(logits(model, read), scores(queries).detach(), atol=2e-2, rtol=1e-2)


def test_classes_met_later_and_matched_by_name(model):
    early, late = [r for r in ROWS if r["label"] in ("cat", "dog")], [r for r in ROWS if r["label"] != "cat"]
    known = [state.label_names for state in model.adapt_steps(chunks(early + late, size=6))]
    assert known[:2] == [("cat", "dog")] * 2 and known[2] == ("cat", "dog", "owl", "cow")
    went_on = model.adapt(chunks(late, size=6), state=model.adapt(chunks(early, size=6)))  # there "dog" is number 0
    assert_same(went_on, model.adapt(chunks(early + late, size=6)))
    late_only = logits(model, model.adapt(chunks(late)))
    assert late_only.shape == (5, 3)
    first = model.adapt(chunks(early)[:1])
    assert torch.equal(logits(model, TaskState.stack([first, went_on]).select(0)), logits(model, first))
    padded = {name: t.repeat(2, 1) for name, t in QUERIES.items()}
    assert (logits(model, TaskState.stack([first, went_on]), padded)[:5, 2:] == -1e4).all()
    numbers = {"input_ids": torch.full((1, 2, 3), 9), "labels": torch.tensor([[2, 0]])}
    assert model.adapt([numbers]).label_names == ("0", "1", "2")
    assert model.adapt([numbers], state=first).label_names == ("cat", "dog", "2")


def test_merged_states_are_one_that_read_all():
    model = make_classifier(trained=False)
    one, two = model.adapt(chunks(ROWS[:9])), model.adapt(chunks(ROWS[10:]))  # "cat" first; "owl" first
    assert one.class_names != two.class_names
    merged, read = TaskState.merge([one, two]), model.adapt(chunks(ROWS[:9]) + chunks(ROWS[10:]))
    assert merged.class_names == read.class_names and torch.equal(merged.step, read.step)
    for name in ("count", "total", "moment", "prototype", "mass"):
        torch.testing.assert_close(merged.tensors[name], read.tensors[name], atol=1e-4, rtol=1e-4, msg=name)
    share = (two.tensors["count"].sum() / read.tensors["count"].sum()).item()
    assert 0.3 < share < 0.7
    cat = read.label_names.index("cat"), two.label_names.index("cat")
    counts = [s.tensors["count"][0, c] for s, c in ((read, cat[0]), (two, cat[1]))]
    mean = one.tensors["fitted"][0, 0].lerp(two.tensors["fitted"][0, cat[1]], counts[1] / counts[0])
    torch.testing.assert_close(merged.tensors["fitted"][0, cat[0]], mean)
    assert torch.equal(logits(model, merged).argmax(1), logits(model, read).argmax(1))


def test_rows_without_a_label_change_nothing(model):
    state = model.adapt(chunks())
    nothing = chunks()[0] | {"labels": torch.full((1, 5), -100), "label_names": ("new",)}
    same = model.adapt([nothing], state=state)
    assert same.class_names == state.class_names and torch.equal(same.step, state.step)
    assert torch.equal(same.num_tokens, state.num_tokens)
    assert all(torch.equal(state.tensors[name], same.tensors[name]) for name in state.tensors)
    one = chunks()[0]
    some = one | {"labels": one["labels"].clone()}
    some["labels"][0, 3:] = -100
    fewer = {name: t[:, :3] if name != "label_names" else t for name, t in one.items()}
    assert_same(model.adapt([some], state=state), model.adapt([fewer], state=state))


def test_loss_counts_queries_of_classes_that_were_read(model):
    state = model.adapt(chunks([r for r in ROWS if r["label"] != "cow"]))
    scores, labels = logits(model, state), torch.tensor([0, 1, 2, -100, 2])
    expected = torch.nn.functional.cross_entropy(scores, labels)
    torch.testing.assert_close(model(**QUERIES, labels=labels, task_state=state).loss, expected)
    with model.using(state):
        assert torch.equal(model(**QUERIES).logits, model(**QUERIES, task_state=state).logits)
    with model.disable_adapter():
        assert model(**QUERIES).logits.shape == (5, 2)  # the base's own random head
    assert model(**QUERIES, task_state=model.initial_state()).logits.shape == (5, 0)


def test_gradients_reach_lora_through_what_was_read():
    model = make_classifier(regime="explicit", target_modules="all-linear").train()
    episodes = [{"support": ROWS[:9], "query": ROWS[20:22]}, {"support": ROWS[9:20], "query": ROWS[22:]}]
    batch = LabelledEpisodeCollator(BYTES, chunk_size=5)(episodes)
    assert batch["chunk_input_ids"].shape[:3] == (2, 3, 5) and batch["labels"].shape == (2, 2)
    assert (batch["chunk_labels"][0, 0] == -100).all() and batch["chunk_labels"][0, 2].tolist()[4] == -100
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 2, 4)
    untouched = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []


@pytest.mark.parametrize("regime", ["parametric", "explicit"])
def test_trainer_moves_every_parameter(regime, tmp_path):
    sizes = {"num_classes": 3, "num_support": 14, "num_queries": 3, "num_episodes": 6}
    episodes = episodes_from_labels(ROWS, template=None, **sizes)
    config = IAIConfig(task_type="SEQ_CLS", state_type="linear", regime=regime, r=2, target_modules="all-linear")
    arguments = IAITrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, chunk_size=4, max_chunks=4, curriculum=0,
        learning_rate=1e-2, save_strategy="no", report_to="none", eval_chunks=(1, 2), use_cpu=True,
        gradient_checkpointing=regime == "explicit",
    )  # fmt: skip
    trainer = IAITrainer(
        make_encoder(), arguments, peft_config=config, processing_class=BYTES, train_dataset=episodes,
        eval_dataset=episodes,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    moved = {n: not torch.equal(before[n], p) for n, p in trainer.model.named_parameters()}
    assert {n for n, has in moved.items() if has} == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.evaluate()["eval_loss_at_chunks_2"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_state_tokens": 4}, "num_state_tokens=4 has no meaning for state_type='linear': leave it None"),
        ({"signal": "gradients"}, "signal='gradients' has no meaning .*leave it 'observations'"),
        ({"accumulation": "recent"}, "accumulation='recent' has no meaning"),
        ({"pooling": "max"}, r"pooling must be one of \['mean', 'cls'\], got 'max'"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save=.* cannot be combined with IAI"),
    ],
)
def test_configurations_that_cannot_work(values, message):
    with pytest.raises(ValueError, match=message):
        IAIConfig(task_type="SEQ_CLS", state_type="linear", **values)


def test_inputs_that_cannot_work(model, tmp_path):
    state, one = model.adapt(chunks()), chunks()[0]
    for chunk, message in [
        ({"input_ids": one["input_ids"][0]}, r"input_ids \(batch, examples, tokens\).*got input_ids of shape \(5, "),
        (one | {"labels": torch.zeros(1, 4)}, r"labels of texts .* must have shape \(1, 5\), got \(1, 4\)"),
        (one | {"label_names": ["a"]}, "labels must be -100 or from 0 to 0"),
        (one | {"label_names": ["a"] * 4}, "label_names must be different strings"),
        (one | {"label_names": [["a"], ["b"]]}, "label_names of 2 tasks for a chunk of 1"),
        (one | {"input_ids": one["input_ids"].repeat(1, 1, 9)}, "an example of .* does not fit the window of 64"),
    ]:
        chunk = chunk if chunk.get("input_ids").dim() == 2 else chunk | {"attention_mask": None}
        with pytest.raises(ValueError, match=message):
            model.adapt([chunk])
    for call, message in [
        (lambda: model(**QUERIES), "a linear adapter has no classes without a task state"),
        (lambda: model(**QUERIES, task_state=state, labels=torch.full((5,), 4)), "labels must be one number below 4"),
        (lambda: model(**QUERIES, task_state=state, output_hidden_states=True), "output_hidden_states"),
        (lambda: model(**QUERIES, task_state=TaskState.stack([state] * 2)), "as many for each of the 2 tasks"),
        (lambda: TaskState.stack([state] * 2).label_names, "2 tasks have names of their own"),
        (lambda: export_to_peft(model, state, tmp_path / "x"), "use export_classifier"),
        (lambda: export_classifier(model, model.initial_state(), tmp_path / "x"), "needs two classes, this state has"),
        (lambda: chunks([{"text": "a", "label": 3}]), "'label' of row 0 must be a string, got 3"),
        (lambda: chunks([*ROWS, {"text": "a"}]), "row 24 must have a text and a label"),
        (lambda: make_classifier(make_base()), "needs a sequence classifier, got LlamaForCausalLM"),
        (lambda: get_peft_model(make_encoder(), IAIConfig(task_type="CAUSAL_LM")), "reads state_type='linear' only"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_class_numbers_without_names_stay_within_reason():
    chunk = next(iter(chunks()))
    unnamed = {name: value for name, value in chunk.items() if name != "label_names"}
    labels = unnamed["labels"].clone()
    labels[0, 0] = 10**7
    with pytest.raises(ValueError, match="class number 10000000 without label_names.*at most 9999"):
        make_classifier().adapt([unnamed | {"labels": labels}])


def test_a_regression_loses_half_the_mean_squared_error_of_real_queries():
    model, draw = make_classifier(likelihood="gaussian"), torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, 32, generator=draw), torch.randn(2, 9, 2, generator=draw)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0  # padding, which changes nothing
    state = model.adapt([{"inputs_embeds": x, "labels": y, "attention_mask": mask}])
    alone = model.adapt([{"inputs_embeds": x[:1, :5], "labels": y[:1, :5]}])
    assert state.num_tokens.tolist() == [5, 9] and alone.num_tokens.tolist() == [5]
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(state.tensors[name][:1], tensor)
    queries, labels = torch.randn(4, 32, generator=draw), torch.randn(4, 2, generator=draw)
    output = model(inputs_embeds=queries, labels=labels, task_state=state)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean() / 2)
    for wrong in (labels[:, :1], labels.long(), labels[:, 0]):
        with pytest.raises(ValueError, match=r"labels must be floating numbers \(4, 2\)"):
            model(inputs_embeds=queries, labels=wrong, task_state=state)
    one = model.adapt([{"inputs_embeds": x, "labels": y[..., 0]}])  # one target needs no axis of its own
    output = model(inputs_embeds=queries, labels=labels[:, 0], task_state=one)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels[:, 0]).square().mean() / 2)


def test_a_training_episode_of_a_regression_is_reading_then_answering():
    model, draw = make_classifier(likelihood="gaussian"), torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 3, 5, 32, generator=draw), torch.randn(1, 3, 5, 2, generator=draw)
    queries, labels = torch.randn(1, 4, 32, generator=draw), torch.randn(1, 4, 2, generator=draw)
    episode = model(inputs_embeds=queries, labels=labels, chunk_inputs_embeds=x, chunk_labels=y)
    state = model.adapt({"inputs_embeds": x[:, k], "labels": y[:, k]} for k in range(3))
    expected = model(inputs_embeds=queries[0], labels=labels[0], task_state=state)
    torch.testing.assert_close(episode.loss, expected.loss)
    torch.testing.assert_close(episode.logits[0], expected.logits)
