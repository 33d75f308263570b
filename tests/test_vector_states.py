"""States of vectors: (x, y) in chunks, x in queries; read by a base in regime explicit, or the weights of an mlp."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from samples import arguments
from samples import vector_examples as examples
from samples import vector_queries as queries
from samples import vector_stream as stream
from tiny import (
    CLASSES,
    OUTPUTS,
    TARGETS,
    VECTOR_BASES,
    VECTOR_SIZES,
    disturb,
    make_base,
    make_vector_base,
    make_vector_model,
)
from tiny import VECTOR_WIDTH as WIDTH
from torch.distributions import Normal
from torch.nn.functional import cross_entropy, gelu
from transformers import AutoModelForCausalLM, MambaConfig

from hf_iai import IAIConfig, IAITrainer, TaskState, chunk_vectors, export_to_peft, vector_base
from hf_iai.evaluation import evaluate_curve

STATES = {
    "prefix": {"regime": "explicit", "state_type": "prefix"},
    "prompt": {"regime": "explicit", "state_type": "prompt"},
    "lora": {"regime": "explicit", "state_type": "lora"},
    "mlp": {"state_type": "mlp"},
    "mlp by gradients": {"state_type": "mlp", "signal": "gradients"},
}
implicit_model = partial(make_vector_model, regime="implicit")
every_state = pytest.mark.parametrize("kind", STATES)
every_likelihood = pytest.mark.parametrize("likelihood", OUTPUTS)


def vector_model(kind, likelihood="softmax", base="llama", **config):
    return make_vector_model(base, likelihood=likelihood, **({"num_state_tokens": 4} | STATES[kind] | config))


def logits_of(model, state, query=None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(query or queries()), task_state=state).logits


def episode(likelihood, num_chunks=2):
    """Two tasks of two chunks and three queries each."""
    streams = [stream(likelihood, seed, num=12) for seed in (0, 3)]
    chunks = [
        torch.cat([torch.stack([c[name] for c in s], 1) for s in streams]) for name in ("inputs_embeds", "labels")
    ]
    asked = [next(chunk_vectors(*examples(3, likelihood, seed), chunk_size=3)) for seed in (7, 8)]
    inputs = {"inputs_embeds": torch.cat([a["inputs_embeds"] for a in asked])}
    return inputs | {
        "chunk_inputs_embeds": chunks[0],
        "chunk_labels": chunks[1],
        "labels": torch.cat([a["labels"] for a in asked]),
    }


@every_likelihood
def test_an_mlp_state_is_the_weights_of_a_network(likelihood):
    model, query = vector_model("mlp", likelihood), queries()
    state = model.adapt(stream(likelihood))
    core = model.base_model.core
    rows = core.corrected(model.base_model.reader.base, state)["rows"][0, 0, 0].detach()  # (h, n + 1 + V)
    expected = torch.zeros(4, OUTPUTS[likelihood])
    for row in rows:
        unit = gelu(query["inputs_embeds"] @ row[:WIDTH] + row[WIDTH])
        expected += unit[:, None] * row[WIDTH + 1 :]
    expected = expected.log_softmax(-1) if likelihood == "softmax" else expected
    assert torch.allclose(logits_of(model, state), expected, rtol=1e-4, atol=1e-5)


@every_likelihood
def test_an_explicit_answer_is_read_out_behind_the_state(likelihood):
    """One token, of transformers' own hidden states; a soft prompt is a text in front of it."""
    model, query = vector_model("prompt", likelihood), queries()
    state = model.adapt(stream(likelihood))
    core, base = model.base_model.core, model.base_model.reader.base
    with torch.no_grad():
        prompt = core.corrected(base, state)["prompt"][0, 0, 0]
        text = torch.cat([prompt.expand(4, -1, -1), core.vector(query["inputs_embeds"]).unsqueeze(1)], 1)
        said = core.readout(model.base_model.model.base_model(inputs_embeds=text).last_hidden_state[:, -1])
    expected = said.log_softmax(-1) if likelihood == "softmax" else said[:, :TARGETS]
    assert (logits_of(model, state) - expected).abs().max() < 1e-4


@every_state
@every_likelihood
def test_untrained_it_knows_nothing(kind, likelihood):
    model, inputs = vector_model(kind, likelihood, trained=False), episode(likelihood)
    if kind == "mlp by gradients":  # which learns before it is trained
        inputs = {name: t[:, :0] if name.startswith("chunk") else t for name, t in inputs.items()}
    with torch.no_grad():
        found = model(**inputs)
    targets = inputs["labels"]
    if likelihood == "softmax":
        assert (found.logits.softmax(-1) - 1 / CLASSES).abs().max() < 1e-6
        expected = torch.tensor(CLASSES).log()
    else:
        assert not found.logits.any()
        unit = 0.5 * targets.square()
        expected = (unit if "mlp" in kind else -Normal(0, 1).log_prob(targets)).mean()
    assert (found.loss - expected).abs() < 1e-5


@every_state
@every_likelihood
def test_labels_count(kind, likelihood):
    model, inputs = vector_model(kind, likelihood), episode(likelihood)
    with torch.no_grad():
        found, other = (
            model(**inputs | {"chunk_labels": y}) for y in (inputs["chunk_labels"], inputs["chunk_labels"].flip(2))
        )
    assert (found.logits - other.logits).abs().max() > 1e-5


@every_likelihood
@pytest.mark.parametrize("second_order", [False, True])
def test_the_gradient_of_an_mlp_state(likelihood, second_order):
    """One step of SGD on the mean loss of the chunk; second order differentiates through it."""
    values = {"head": "sgd", "initial_rate": 0.2, "second_order": second_order}
    model, inputs = vector_model("mlp by gradients", likelihood, trained=False, **values), episode(likelihood)
    core = model.base_model.core
    disturb(model, 0.3)
    with torch.no_grad():
        core.head.log_rate["rows"].zero_()
    start = core.state.start["rows"].detach().requires_grad_()  # (1, 1, h, n + 1 + V)

    def scores(rows, x):
        weight, bias, added = rows[..., :WIDTH], rows[..., WIDTH], rows[..., WIDTH + 1 :]
        return gelu(x @ weight.mT + bias) @ added

    def loss(rows, x, y):
        found = scores(rows[0, 0], x)
        return cross_entropy(found, y) if likelihood == "softmax" else 0.5 * (found - y).square().mean()

    losses = []
    for task in range(2):
        x, y = inputs["chunk_inputs_embeds"][task, 0], inputs["chunk_labels"][task, 0]
        (gradient,) = torch.autograd.grad(loss(start, x, y), start, create_graph=second_order)
        losses.append(loss(start - 0.2 * gradient, inputs["inputs_embeds"][task], inputs["labels"][task]))
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), start)

    model.eval()  # the loss under the last state alone
    inputs = {name: t[:, :1] if name.startswith("chunk") else t for name, t in inputs.items()}
    found = model(**inputs)
    assert (found.loss - torch.stack(losses).mean()).abs() < 1e-6
    found.loss.backward()
    assert (core.state.start["rows"].grad - expected).abs().max() < 1e-5


@every_likelihood
def test_an_example_is_read_as_its_vector_plus_its_target(likelihood, monkeypatch):
    model, (chunk, *_) = vector_model("prefix", likelihood), stream(likelihood)
    core, seen = model.base_model.core, []
    read_out = core._read_out
    monkeypatch.setattr(core, "_read_out", lambda base, x, mask: seen.append(x) or read_out(base, x, mask))
    model.adapt([chunk])
    labels = chunk["labels"] if likelihood == "softmax" else chunk["labels"].view(1, -1, TARGETS)
    expected = core.vector(chunk["inputs_embeds"]) + core.target(labels)
    torch.testing.assert_close(seen[0], expected.detach())


@pytest.mark.parametrize("kind", ["prefix", "mlp by gradients"])
def test_saved_and_loaded(kind, tmp_path):
    base = make_vector_base()
    base.save_pretrained(tmp_path / "base")
    model = vector_model(kind, "gaussian", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    state = model.adapt(stream("gaussian"))
    model.save_pretrained(tmp_path / "adapter")
    state.save_pretrained(tmp_path / "state")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    again = TaskState.from_pretrained(tmp_path / "state")
    assert torch.equal(logits_of(loaded, again), logits_of(model, state))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"Reads vectors of {WIDTH} numbers; answers: {TARGETS} real targets" in card
    assert "model.adapt(chunk_vectors(vectors, targets))" in card


def test_averages_merge():
    """Forgetting, which depends on the order, is left out."""
    model, chunks = vector_model("mlp"), stream("softmax", num=24)
    with torch.no_grad():
        model.base_model.core.average.forgetting.zero_()
    whole = model.adapt(chunks)
    merged = TaskState.merge([model.adapt(chunks[:2]), model.adapt(chunks[2:])])
    assert (logits_of(model, merged) - logits_of(model, whole)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["prompt", "lora", "mlp"])
def test_a_recurrent_base_reads_vectors(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
    base = AutoModelForCausalLM.from_config(MambaConfig(**VECTOR_SIZES | sizes))
    model = vector_model(kind, base=base)
    first, second = (logits_of(model, state) for state in list(model.adapt_steps(stream("softmax")))[:2])
    assert (first - second).abs().max() > 1e-4


def noisy_lines(num: int, seed: int) -> Dataset:
    """y = <w, x> + noise in the plane, w drawn for each task; 16 examples and 4 queries."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(num):
        weight, x = torch.randn(2, generator=generator), torch.randn(20, 2, generator=generator)
        y = (x @ weight + 0.3 * torch.randn(20, generator=generator)).tolist()
        points = [{"vector": v, "label": t} for v, t in zip(x.tolist(), y, strict=True)]
        rows.append({"support": points[:16], "query": points[16:]})
    return Dataset.from_list(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "mlp", "mlp by gradients"])
def test_the_error_falls_with_chunks(kind, tmp_path):
    """On lines that training has not seen, four points a chunk. Read-outs that were trained on two go on to four."""
    model = vector_model(kind, "gaussian", trained=False, vector_width=2, num_outputs=1, r=32, num_state_tokens=8)
    trained = 4 if kind == "mlp by gradients" else 2
    args = arguments(
        tmp_path, chunk_size=4, max_chunks=trained, max_steps=250, learning_rate=5e-3, per_device_train_batch_size=32,
        halve_chunks=0.0, curriculum=0.0, eval_chunks=(0, 1, 2, 4), save_steps=1000,
    )  # fmt: skip
    trainer = IAITrainer(model, args, train_dataset=noisy_lines(8000, seed=1), eval_dataset=noisy_lines(128, seed=2))
    trainer.train()
    after = trainer.evaluate()
    losses = [after[f"eval_loss_at_chunks_{n}"] for n in (0, 1, 2, 4)]
    assert all(more < fewer - 0.02 for fewer, more in pairwise(losses))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"state_type": "mlp", "vector_width": None, "num_outputs": None}, "answers about vectors: pass vector_width"),
        ({"state_type": "mlp", "regime": "explicit"}, "the bare base says nothing of vectors"),
        ({"state_type": "prefix", "regime": "parametric"}, "the bare base says nothing of vectors"),
        ({"state_type": "mlp", "signal": "both"}, "regime='parametric' have the signals .*, got 'both'"),
        ({"signal": "gradients"}, "regime='explicit' have the signals .*, got 'gradients'"),
        ({"accumulation": "recent"}, "accumulation='recent' is for text, got vector_width=5"),
        ({"num_kept_tokens": 2}, "num_kept_tokens=2 is for text"),
        ({"num_outputs": None}, "both be at least 1, or both None for text, got 5 and None"),
        (
            {"prediction": "logits"},
            "has no meaning .* it is for regime='implicit'",
        ),
        ({"state_type": "linear", "task_type": "SEQ_CLS"}, "vector_width=5 has no meaning for state_type='linear'"),
    ],
)
def test_configurations_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        IAIConfig(**{"task_type": "CAUSAL_LM", "vector_width": WIDTH, "num_outputs": CLASSES} | values)


def test_bad_input():
    model = vector_model("mlp")
    chunk, state = stream("softmax")[0], model.adapt(stream("softmax"))
    for wrong, message in (
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, r"vector_width=5 reads inputs_embeds \(..., 5\)"),
        (chunk | {"inputs_embeds": torch.zeros(1, 6, 3)}, "inputs_embeds must be finite floating vectors"),
        (chunk | {"labels": chunk["labels"] + 1}, "labels must be -100 or from 0 to 2, one for each of label_names"),
        (chunk | {"attention_mask": torch.ones(1, 4)}, r"attention_mask of vectors \(1, 6, 5\) must be \(1, 6\)"),
        (chunk | {"labels": chunk["labels"].float()}, "must be whole numbers below 3 under likelihood='softmax'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.adapt([wrong])
    with pytest.raises(ValueError, match="pass task_state=model.adapt"):
        model(**queries())
    with pytest.raises(ValueError, match="as many for each of the 2 tasks of the state"):
        model(**queries(3), task_state=model.initial_state(2))
    with pytest.raises(ValueError, match="labels must be from 0 to num_outputs - 1 = 2, got 0..7"):
        model(**queries(), labels=torch.tensor([0, 7, 1, 2]), task_state=state)
    with pytest.raises(ValueError, match="logits and a loss only, got .*output_attentions"):
        model(**queries(), task_state=state, output_attentions=True)
    with pytest.raises(ValueError, match="a chunk of 30 tokens does not fit"):
        model.adapt(stream("softmax", num=30, chunk_size=30))
    with pytest.raises(ValueError, match="PEFT has neither"):
        export_to_peft(model, state, "nowhere")
    with pytest.raises(ValueError, match="a vector and floating targets, got .*'label': 1"):
        rows = [{"vector": [0.0] * WIDTH, "label": 1}]
        evaluate_curve(vector_model("mlp", "gaussian"), [{"support": rows, "query": rows}], (1,), chunk_size=1)


def test_whole_numbers_stay_as_they_are(tmp_path):
    """In whatever order classes come; names are numbered as they come."""
    model = vector_model("mlp by gradients")
    x, labels = torch.randn(6, WIDTH), torch.tensor([2, 0, 1, 1, 0, 2])
    (chunk,) = chunk_vectors(x, labels, chunk_size=6)
    own = {"inputs_embeds": x[None], "labels": labels[None]}
    assert torch.equal(logits_of(model, model.adapt([chunk])), logits_of(model, model.adapt([own])))
    (named,) = chunk_vectors(x, [f"class {c}" for c in labels], chunk_size=6)
    assert named["labels"].tolist() == [[0, 1, 2, 2, 1, 0]]
    assert (logits_of(model, model.adapt([named])) - logits_of(model, model.adapt([own]))).abs().max() > 1e-4

    rows = [{"vector": v.tolist(), "label": int(c)} for v, c in zip(x, labels, strict=True)]
    episodes = Dataset.from_list([{"support": rows[:4], "query": rows[4:]}])
    trainer = IAITrainer(model, arguments(tmp_path, chunk_size=4), train_dataset=episodes)
    batch = trainer.data_collator(list(episodes))
    assert batch["chunk_labels"].tolist() == [[[2, 0, 1, 1]]]
    assert batch["labels"].tolist() == [[0, 2]]
    written = Dataset.from_list([{n: [r | {"label": str(r["label"])} for r in rows] for n in ("support", "query")}])
    assert trainer.data_collator(list(written))["labels"].tolist() == [labels.tolist()]


@pytest.mark.parametrize("kind", ["prefix", "mlp", "implicit"])
@pytest.mark.parametrize("named", [False, True])
def test_a_curve_of_accuracy(kind, named):
    """Of what is answered after one and two chunks, in the episode's own names, next to classifiers of the vectors."""
    model = implicit_model() if kind == "implicit" else vector_model(kind)
    x, labels = (
        torch.randn(13, WIDTH, generator=torch.Generator().manual_seed(1)),
        [2, 0, 1, 1, 0, 2, *range(3), 0, 1, 2, 0],
    )
    labels = [f"class {c}" for c in labels] if named else labels
    rows = [{"vector": v.tolist(), "label": c} for v, c in zip(x, labels, strict=True)]
    curve = evaluate_curve(model, [{"support": rows[:8], "query": rows[8:]}], (1, 2), chunk_size=4, show_progress=False)
    chunks, query = list(chunk_vectors(x[:8], labels[:8], chunk_size=4)), {"inputs_embeds": x[8:]}
    if kind == "implicit":
        answers = list(model.refine(chunks, query))
    else:
        answers = [logits_of(model, state, query) for state in model.adapt_steps(chunks)]
    names = ["class 2", "class 0", "class 1"] if named else [0, 1, 2]
    for n, logits in enumerate(answers, 1):
        right = [names[best] == label for best, label in zip(logits.argmax(-1), labels[8:], strict=True)]
        assert curve.losses["iai", n, 0][0].tolist() == right
    assert curve.losses["nearest_class_mean", 2, 0].shape == (1, 5)


@pytest.mark.parametrize("kind", ["prefix", "mlp", "implicit", "linear"])
def test_a_curve_of_squared_error(kind):
    """Of what is answered after one and two chunks, next to regressions of all examples so far; without dropout."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    if kind == "linear":
        config = IAIConfig(task_type="SEQ_CLS", state_type="linear", likelihood="gaussian")
        model = get_peft_model(vector_base(WIDTH), config)
    else:
        model = implicit_model(likelihood="gaussian") if kind == "implicit" else vector_model(kind, "gaussian")
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(25, WIDTH, generator=draw), torch.randn(25, TARGETS, generator=draw)
    rows = [{"vector": v.tolist(), "label": t.tolist()} for v, t in zip(x, y, strict=True)]
    curve = evaluate_curve(
        model.train(),
        [{"support": rows[:20], "query": rows[20:]}, {"support": rows[5:], "query": rows[:3]}],
        (1, 2),
        ("ridge", "nearest_neighbours"),
        chunk_size=10,
        show_progress=False,
    )
    chunks, query = list(chunk_vectors(x[:20], y[:20], chunk_size=10)), {"inputs_embeds": x[20:]}
    if kind == "implicit":
        answers = list(model.refine(chunks, query))
    else:
        answers = [logits_of(model, state, query) for state in model.adapt_steps(chunks)]
    for n, means in enumerate(answers, 1):
        expected = (means - y[20:]).square().mean(1)
        torch.testing.assert_close(torch.from_numpy(curve.losses["iai", n, 0][0]).float(), expected)
        fitted = linear_model.RidgeCV([10.0**k for k in range(-4, 4)]).fit(x[: 10 * n], y[: 10 * n]).predict(x[20:])
        torch.testing.assert_close(
            torch.from_numpy(curve.losses["ridge", n, 0][0]).float(),
            (torch.from_numpy(fitted).float() - y[20:]).square().mean(1),
        )
        nearest = (x[20:, None] - x[None, : 10 * n]).square().sum(-1).topk(5, largest=False)  # (Q, 5)
        share = nearest.values.rsqrt()
        mean = (y[nearest.indices] * share.unsqueeze(-1)).sum(1) / share.sum(1, keepdim=True)
        torch.testing.assert_close(
            torch.from_numpy(curve.losses["nearest_neighbours", n, 0][0]).float(), (mean - y[20:]).square().mean(1)
        )
    assert model.training and curve.metric == "squared_error"
    assert [row["method"] for row in curve.rows()] == 2 * ["iai"] + 2 * ["ridge"] + 2 * ["nearest_neighbours"]
    assert torch.from_numpy(curve.losses["nearest_neighbours", 2, 0][1]).isnan().tolist() == [False] * 3 + [True] * 2


def test_padding_by_label_or_mask():
    model, chunk = vector_model("mlp by gradients"), stream("softmax")[0]
    fewer = {name: chunk[name][:, :4] for name in ("inputs_embeds", "labels")}
    labels = chunk["labels"].clone()
    labels[:, 4:] = -100
    unlabelled = {"inputs_embeds": chunk["inputs_embeds"], "labels": labels}
    assert torch.allclose(
        logits_of(model, model.adapt([unlabelled])), logits_of(model, model.adapt([fewer])), atol=1e-6
    )


@every_state
def test_other_types_of_labels(kind):
    x, y = torch.randn(1, 6, WIDTH), torch.randn(1, 6, TARGETS)
    model = vector_model(kind, "gaussian")
    found = [logits_of(model, model.adapt([{"inputs_embeds": x, "labels": t}])) for t in (y, y.double())]
    assert torch.equal(*found)
    y[0, 2, 0] = torch.nan
    for broken in (torch.inf, torch.nan):
        vectors = torch.full((1, 2, WIDTH), broken)
        with pytest.raises(ValueError, match="finite"):
            vector_model("mlp").adapt([{"inputs_embeds": vectors, "labels": torch.tensor([[0, 1]])}])
    with pytest.raises(ValueError, match="labels hold values that are not finite"):
        model.adapt([{"inputs_embeds": x, "labels": y}])
    model, labels = vector_model(kind), torch.tensor([[0, 1, 2, 0, 1, 2]])
    found = [logits_of(model, model.adapt([{"inputs_embeds": x, "labels": t}])) for t in (labels, labels.int())]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_base_whose_only_token_is_padding(kind):
    """Its embeddings are 0, so that slots cannot start as tokens do."""
    config = VECTOR_BASES["llama"]()
    config.pad_token_id = 0
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    assert not base.get_input_embeddings().weight.any()
    model = vector_model(kind, base=base)
    first, second = (logits_of(model, model.adapt(stream("softmax", seed))) for seed in (0, 3))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
def test_a_hybrid_base_in_half_precision(kind):
    model = vector_model(kind, base=make_base("lfm2").to(torch.bfloat16))
    assert logits_of(model, model.adapt(stream("softmax"))).isfinite().all()


def test_what_is_for_text():
    model = vector_model("mlp")
    state, ids = model.adapt(stream("softmax")), torch.zeros(1, 3, dtype=torch.long)
    for ask in (lambda: model.generate(ids, task_state=state), lambda: model.base_model.state_effect(state, queries())):
        with pytest.raises(ValueError, match="is for text, but vector_width=5"):
            ask()
    with model.disable_adapter(), pytest.raises(ValueError, match="a base says nothing of vectors by itself"):
        model(**queries())
    assert model(**queries(), task_state=state, output_hidden_states=False).logits.shape == (4, CLASSES)


def test_chunks_are_as_long_as_a_base_that_reads_them_can():
    assert vector_model("mlp by gradients").max_chunk_size == 20
    vector_model("mlp by gradients").adapt(stream("softmax", num=100, chunk_size=60))
    assert vector_model("prefix").max_chunk_size == 20
    with pytest.raises(ValueError, match="no example fits a window of 32 beside 40 slots"):
        _ = vector_model("prefix", num_state_tokens=20).max_chunk_size


def test_unasked_queries_have_no_loss():
    model = vector_model("mlp")
    state, labels = model.adapt(stream("softmax")), torch.tensor([0, 1, -100, -100])
    with torch.no_grad():
        found = model(**queries(), labels=labels, task_state=state).loss
        first = model(inputs_embeds=queries()["inputs_embeds"][:2], labels=labels[:2], task_state=state).loss
    assert torch.allclose(found, first)
