"""Given vectors as observations of a linear state, of classes and of real targets."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import disturb
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments, TaskState, export_classifier, vector_base
from hf_iai.data import VectorEpisodeCollator, batch_chunks, chunk_vectors

WIDTH = 12
_COMMON = {"vocab_size": 8, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 16}
GENERATOR = torch.Generator().manual_seed(0)
X, QUERIES = torch.randn(2, 60, WIDTH, generator=GENERATOR)
TRUTH = torch.randn(WIDTH, 2, generator=GENERATOR)
TARGETS = {
    "softmax": [("low", "middle", "high")[int(v.sign()) + 1] for v in (X @ TRUTH[:, 0] / 2).round()],
    "gaussian": X @ TRUTH + 0.3 * torch.randn(60, 2, generator=GENERATOR) + 1,
}
LIKELIHOODS = pytest.mark.parametrize("likelihood", TARGETS)


def make_base():
    torch.manual_seed(0)
    config = BertConfig(**_COMMON, num_hidden_layers=1, max_position_embeddings=16)
    return AutoModelForSequenceClassification.from_config(config)


def make_model(likelihood, *, trained=True, base=None, **config):
    base = base or make_base()
    torch.manual_seed(1)
    model = get_peft_model(
        base, IAIConfig(task_type="SEQ_CLS", likelihood=likelihood, state_type="linear", r=2, **config)
    )
    if trained:
        disturb(model)
    return model.eval()


def chunks(likelihood, part=slice(0, 60), size=7):
    return list(chunk_vectors(X[part], TARGETS[likelihood][part], chunk_size=size))


@torch.no_grad()
def logits(model, state, queries=QUERIES):
    return model(inputs_embeds=queries, task_state=state).logits


def assert_same(one: TaskState, other: TaskState, atol=1e-4):
    assert one.class_names == other.class_names and torch.equal(one.step, other.step)
    assert torch.equal(one.num_tokens, other.num_tokens)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], atol=atol, rtol=1e-4, msg=name)


@LIKELIHOODS
def test_merged_states_are_one_that_read_all(likelihood):
    model = make_model(likelihood, trained=likelihood == "gaussian")
    one, two = (model.adapt(chunks(likelihood, part)) for part in (slice(0, 28), slice(28, 60)))
    merged, read = TaskState.merge([one, two]), model.adapt(chunks(likelihood))
    sums = ("count", "total", "moment") if likelihood == "softmax" else read.tensors  # the fit depends on the order
    assert_same(*(replace(s, tensors={name: s.tensors[name] for name in sums}) for s in (merged, read)))
    assert_same(TaskState.merge([model.initial_state(), one]), one)
    assert TaskState.stack([model.initial_state(), one]).batch_size == 2


def test_untrained_classes_start_from_nearest_class_means():
    base, model = make_base().eval(), make_model("softmax", trained=False)
    state = model.adapt(chunks("softmax"))

    def features(vectors):
        hidden = base.base_model(inputs_embeds=vectors.unsqueeze(1)).last_hidden_state[:, 0].detach()
        return torch.nn.functional.layer_norm(hidden, hidden.shape[1:], eps=0) / WIDTH**0.5

    names = dict.fromkeys(TARGETS["softmax"])
    assert state.label_names == tuple(names)
    means = [features(X)[torch.tensor([y == name for y in TARGETS["softmax"]])].mean(0) for name in names]
    expected = 15 * (features(QUERIES) @ torch.stack(means).T - torch.stack(means).square().sum(1) / 2)
    fitted = state.tensors["fitted"][0]
    expected = expected + features(QUERIES) @ fitted[:, :-1].T + fitted[:, -1]
    torch.testing.assert_close(logits(model, state), expected, atol=1e-3, rtol=1e-4)
    read = torch.tensor([list(names).index(y) for y in TARGETS["softmax"]])
    assert (logits(model, state, X).argmax(1) == read).float().mean() > 0.75


def test_a_regression_without_an_intercept(tmp_path):
    """Targets that lie a unit higher: a line through 0 leaves it out, also in an adapter that was loaded."""
    model = make_model("gaussian", trained=False, base=vector_base(WIDTH), fit_intercept=False)
    read = list(chunk_vectors(X, X @ TRUTH + 1))
    x, y = X.double(), (X @ TRUTH + 1).double()
    penalty = 1e-3 * x.square().sum() / WIDTH
    rows = torch.linalg.solve(x.T @ x + penalty * torch.eye(WIDTH), x.T @ y)
    torch.testing.assert_close(logits(model, model.adapt(read)).double(), QUERIES.double() @ rows, atol=1e-3, rtol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vector_base(WIDTH), tmp_path).eval()
    assert torch.equal(logits(loaded, loaded.adapt(read)), logits(model, model.adapt(read)))
    assert "chunk_vectors" in (tmp_path / "README.md").read_text()
    other = make_model("gaussian", trained=False, base=vector_base(WIDTH))
    with pytest.raises(ValueError, match="this state belongs to .*, the model is"):
        logits(other, model.adapt(read))
    with pytest.raises(
        ValueError,
        match="leave it True; it is for state_type='linear' with likelihood='gaussian'",
    ):
        make_model("softmax", fit_intercept=False)


def test_a_base_that_changes_nothing_finds_the_line():
    config = LlamaConfig(**_COMMON, num_hidden_layers=0, rms_norm_eps=1e6)
    model = make_model("gaussian", trained=False, base=AutoModelForSequenceClassification.from_config(config))
    state = model.adapt(chunk_vectors(X.numpy(), (X @ TRUTH).numpy()))
    torch.testing.assert_close(logits(model, state), QUERIES @ TRUTH, atol=0.02, rtol=0.01)
    outputs = model(inputs_embeds=QUERIES, task_state=state, labels=QUERIES @ TRUTH + 1)
    torch.testing.assert_close(outputs.loss, (outputs.logits - QUERIES @ TRUTH - 1).square().mean() / 2)
    texts = {"input_ids": torch.ones(1, 3, 4, dtype=torch.long), "labels": torch.rand(1, 3, 2)}
    assert model.adapt([texts], state=state).num_tokens.tolist() == [72]


def episodes(likelihood, num=6, size=10):
    labels = TARGETS[likelihood] if likelihood == "softmax" else TARGETS[likelihood].tolist()
    rows = [{"vector": x, "label": y} for x, y in zip(X.tolist(), labels, strict=True)]
    return [{"support": rows[i : i + size], "query": rows[i + 40 : i + 42]} for i in range(num)]


@LIKELIHOODS
def test_an_episode_is_reading_and_answering(likelihood):
    values = {"regime": "explicit", "target_modules": ["value", "output.dense"]}  # one token has no use for its query
    model = make_model(likelihood, **values)
    batch = VectorEpisodeCollator(4)([episodes(likelihood)[0], {**episodes(likelihood, size=5)[0]}])
    assert batch["chunk_inputs_embeds"].shape == (2, 3, 4, WIDTH) and not batch["chunk_attention_mask"][1, 0].any()
    outputs = model(**batch)
    support = [[x[key] for x in episodes(likelihood)[0]["support"]] for key in ("vector", "label")]
    state = model.adapt(chunk_vectors(*support, chunk_size=4))
    found = outputs.logits[0][:, : len(state.class_names[0])] if likelihood == "softmax" else outputs.logits[0]
    torch.testing.assert_close(found, logits(model, state, batch["inputs_embeds"][0]), atol=1e-3, rtol=1e-3)
    model.train()(**batch).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@LIKELIHOODS
def test_trainer_moves_every_parameter(likelihood, tmp_path):
    arguments = IAITrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=3, chunk_size=4, max_chunks=3, curriculum=0,
        learning_rate=1e-2, save_strategy="no", report_to="none", eval_chunks=(1, 2), use_cpu=True,
    )  # fmt: skip
    model, data = make_model(likelihood, trained=False), episodes(likelihood)
    trainer = IAITrainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainer.evaluate()["eval_loss_at_chunks_2"] > 0


def test_inputs_that_cannot_work(tmp_path):
    model = make_model("gaussian")
    state, one, classes = model.adapt(chunks("gaussian")), chunks("gaussian")[0], chunks("softmax")[0]
    broken, y = one["inputs_embeds"] / torch.arange(7).view(1, 7, 1), one["labels"]  # the first divided by 0
    ids = torch.ones(1, 7, 3, dtype=torch.long)
    for chunk, message in [
        (one | {"input_ids": ids}, "input_ids or inputs_embeds, got both: pass one of the two"),
        (one | {"inputs_embeds": torch.zeros(1, 7, 5)}, r"floating vectors \(..., 12\).*got shape \(1, 7, 5\)"),
        (one | {"inputs_embeds": broken}, "inputs_embeds hold 12 values that are not finite"),
        (one | {"attention_mask": torch.ones(1, 6)}, r"attention_mask of vectors .* must be \(1, 7\), .* got \(1, 6\)"),
        (one | {"labels": y * torch.nan}, "labels hold values that are not finite"),
        (one | {"labels": y[..., 0]}, "targets of 1 outputs for a state of 2"),
        (classes, "must be floating targets, got torch.int64"),
        ({"inputs_embeds": X, "labels": y[0, 0]}, r"got inputs_embeds of shape \(60, 12\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.adapt([chunk], state=state)
    for call, message in [
        (lambda: logits(model, state, X[0]), r"floating vectors \(..., 12\), .*, got shape \(12,\)"),
        (lambda: logits(model, state, X[None]), r"queries must be .* got inputs_embeds of shape \(1, 60, 12\)"),
        (lambda: model(inputs_embeds=X, task_state=state, labels=torch.ones(60)), r"labels must be .* \(60, 2\)"),
        (lambda: make_model("softmax").adapt([one]), "must be integers .*likelihood='gaussian'"),
        (lambda: model.adapt([one, {"input_ids": ids, "labels": y}], parallel=2), "cannot be read in one batch"),
        (lambda: TaskState.merge([state, model.adapt([one | {"labels": y[..., :1]}])]), "states of 1 and 2 outputs"),
        (lambda: export_classifier(model, state, tmp_path / "x"), "likelihood 'softmax'"),
        (
            lambda: IAIConfig(task_type="CAUSAL_LM", likelihood="gaussian"),
            "has no meaning for state_type='prefix'",
        ),
        (lambda: state.label_names, "likelihood 'softmax' has classes"),
        (lambda: list(batch_chunks([[one], [classes]])), "must hold the same, .*: read texts and vectors apart"),
        (lambda: chunk_vectors(X, ["a"]), r"got shape \(60, 12\) and 1 labels"),
        (lambda: chunk_vectors(X[:2], ["a", 0.5]), "labels must be classes .* got both: 'a' and 0.5"),
        (lambda: VectorEpisodeCollator(2)([{"support": [], "query": [{"text": "a"}]}]), "needs a vector and a label"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
