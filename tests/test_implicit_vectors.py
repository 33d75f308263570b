"""Regime implicit of vectors: (x, y) in chunks, x in queries, on a base made from a configuration."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from samples import arguments
from samples import vector_examples as examples
from samples import vector_queries as queries
from samples import vector_stream as stream
from tiny import CLASSES, OUTPUTS, TARGETS, make_vector_base, make_vector_model
from tiny import VECTOR_WIDTH as WIDTH
from torch.distributions import Normal
from transformers import AutoModelForCausalLM

from hf_iai import IAIConfig, IAITrainer, chunk_vectors
from hf_iai.objectives import Objective
from hf_iai.predictions.vector_answers import RealAnswers

every_likelihood = pytest.mark.parametrize("likelihood", OUTPUTS)
vector_model = partial(make_vector_model, regime="implicit")


def refined(model, support, query) -> torch.Tensor:
    return torch.stack(list(model.refine(support, query, with_start=True)))


def test_chunks_that_say_little_do_not_throw_the_mean_out():
    """What a chunk adds lies at most four times as far beyond its mean as that is from the prior's: 1 + 4 here."""
    answers = RealAnswers(8, 1)
    prior, said = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 1.0]]])  # means 0 and 1, and precision 1 of both
    natural, nothing = prior, torch.zeros(1, 1, 2)
    for _ in range(1000):
        natural = answers.refined(natural, said, prior, torch.ones(1, 1, 1), nothing)
    assert 4.7 < answers.output(natural).item() < 5
    certain = torch.tensor([[[9.0, 9.0]]])  # mean 1 and precision 9: as a product of Gaussians
    found = answers.refined(prior, certain, prior, torch.ones(1, 1, 1), nothing)
    torch.testing.assert_close(found, certain, atol=1e-3, rtol=0)


@every_likelihood
def test_the_formula(likelihood):
    """One token each for examples, query and slot, of transformers' own hidden states; products of what they say."""
    model, query = vector_model(likelihood=likelihood), queries()["inputs_embeds"]
    core, wrapped, answers = model.base_model.core, model.base_model.model, model.base_model.core.answers
    with torch.no_grad():
        core.gate.fill_(0.2)

    def natural(hidden):
        said = answers.readout(hidden)
        if likelihood == "softmax":
            return said.log_softmax(-1)
        precision = (8 * torch.tanh(said[..., TARGETS:] / 8)).exp()
        return torch.cat([said[..., :TARGETS] * precision, precision], -1)

    def evidence(hidden, correction):
        if likelihood == "softmax":
            return weight * (natural(hidden) - prior) + correction
        before, said = prior[:, TARGETS:], natural(hidden)
        more = before / 16 * torch.log1p((16 * (said[:, TARGETS:] / before - 1)).exp())
        mean = said[:, :TARGETS] / said[:, TARGETS:] + correction[:, :TARGETS]
        beyond = torch.where(4 * more < before, 4 * more, before) * (mean - prior[:, :TARGETS] / before)
        return weight * torch.cat([more * mean + beyond, more], -1)

    def slot_of(state):
        if likelihood == "softmax":
            return state.softmax(-1) @ answers.rows
        precision = state[:, TARGETS:]
        return answers.value(state[:, :TARGETS] / precision) + answers.certainty(precision.log())

    def outlook(chunk, slot):
        text = torch.stack([core.vector(query), slot + core.slot], 1)
        if chunk is not None:
            y = chunk["labels"][0]
            tokens = core.vector(chunk["inputs_embeds"][0]) + (answers.rows[y] if y.dim() == 1 else answers.value(y))
            text = torch.cat([tokens.expand(4, -1, -1), text], 1)
        return wrapped.base_model(inputs_embeds=text).last_hidden_state[:, -2:].unbind(1)

    with torch.no_grad():
        prior = state = natural(outlook(None, torch.zeros(4, 32))[0])
        expected = [state]
        for chunk in stream(likelihood):
            hidden, slot = outlook(chunk, slot_of(state))
            norm = slot / slot.square().mean(-1, keepdim=True).sqrt()
            weight = 2 * (norm @ core.weight + core.offset).sigmoid().unsqueeze(1)
            state = state + evidence(hidden, core.gate * answers.readout(slot))
            expected.append(state)
    expected = torch.stack(expected)
    if likelihood == "gaussian":
        expected = expected[..., :TARGETS] / expected[..., TARGETS:]
    found = refined(model, stream(likelihood), queries())
    assert (found - expected).abs().max() < 1e-4
    assert (found[1:] - found[:-1]).abs().amax((1, 2)).min() > 1e-3


@every_likelihood
def test_untrained_it_knows_nothing(likelihood):
    """All classes are alike; targets are N(0, 1), but for the little that a chunk adds; the loss is theirs."""
    model = vector_model(likelihood=likelihood, trained=False)
    found = refined(model, stream(likelihood), queries())
    assert (found.softmax(-1) - 1 / CLASSES).abs().max() < 1e-6 if likelihood == "softmax" else not found.any()
    inputs = episode(likelihood)
    labels = inputs["labels"]
    if likelihood == "softmax":
        assert (model(**inputs).loss - torch.tensor(CLASSES).log()).abs() < 1e-5
    else:
        expected = [-Normal(0, p**-0.5).log_prob(labels).mean() for p in (1, 1.2)]
        assert min(expected) - 1e-5 <= model(**inputs).loss <= max(expected) + 1e-5


def test_precision_never_falls_and_means_stay_near_those_of_the_chunks():
    """Whatever 200 chunks say, at precisions from 1e-3 to 3000 and weights from 0 to 2."""
    answers, generator = RealAnswers(8, TARGETS), torch.Generator().manual_seed(0)

    def said() -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_precision = torch.randn(2, 5, 1, TARGETS, generator=generator)
        precision = (8 * log_precision.tanh()).exp()
        return mean, torch.cat([mean * precision, precision], -1)

    start, prior = said()
    state, far, weights = prior, torch.zeros_like(start), torch.zeros(5, 1, 1)
    for _ in range(200):
        before = state
        mean, chunk = said()
        weight = 2 * torch.rand(5, 1, 1, generator=generator)
        far, weights = far.maximum((mean - start).abs()), weights + weight
        state = answers.refined(state, chunk, prior, weight, torch.zeros(5, 1, 2 * TARGETS))
        assert (state[..., TARGETS:] >= before[..., TARGETS:]).all()
        moved = (answers.output(state) - start.squeeze(1)).abs().unsqueeze(1)
        assert (moved <= far * weights.clamp_min(1) + 1e-3).all()


def episode(likelihood: str, num_chunks: int = 3) -> dict:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, num_chunks, 4, WIDTH, generator=generator)
    asked = torch.randn(2, 3, WIDTH, generator=generator)
    if likelihood == "softmax":
        y, labels = (torch.randint(CLASSES, shape, generator=generator) for shape in ((2, num_chunks, 4), (2, 3)))
    else:
        y, labels = (torch.randn(*shape, TARGETS, generator=generator) for shape in ((2, num_chunks, 4), (2, 3)))
    return {"chunk_inputs_embeds": x, "chunk_labels": y, "inputs_embeds": asked, "labels": labels}


@every_likelihood
def test_an_episode_is_refined_as_its_queries_are(likelihood):
    model, inputs = vector_model(likelihood=likelihood), episode(likelihood)
    out = model(**inputs)
    x, y = inputs["chunk_inputs_embeds"], inputs["chunk_labels"]
    support = [{"inputs_embeds": x[:, k], "labels": y[:, k]} for k in range(3)]
    expected = refined(model, support, {"inputs_embeds": inputs["inputs_embeds"].flatten(0, 1)})[-1]
    assert (out.logits.flatten(0, 1) - expected).abs().max() < 1e-5
    if likelihood == "softmax":
        loss = torch.nn.functional.cross_entropy(expected, inputs["labels"].flatten())
        assert (out.loss - loss).abs() < 1e-5
    padded = dict(inputs)  # one query more of each task, and a chunk in front
    fill = 0 if likelihood == "softmax" else 77.0
    trailing = (0, 0) * (inputs["labels"].dim() - 2)
    padded["inputs_embeds"] = torch.nn.functional.pad(inputs["inputs_embeds"], (0, 0, 0, 1))
    padded["labels"] = torch.nn.functional.pad(inputs["labels"], (*trailing, 0, 1), value=fill)
    padded["attention_mask"] = torch.tensor([[1, 1, 1, 0]] * 2)
    padded["chunk_inputs_embeds"] = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 0))
    padded["chunk_labels"] = torch.nn.functional.pad(y, (*trailing, 0, 0, 1, 0))
    padded["chunk_attention_mask"] = torch.tensor([[[0] * 4, *[[1] * 4] * 3]] * 2)
    assert (model(**padded).loss - out.loss).abs() < 1e-5


@every_likelihood
def test_a_greedy_episode_trains_everything(likelihood):
    model = vector_model(likelihood=likelihood).train()
    model(**episode(likelihood), objective=Objective("greedy")).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@every_likelihood
def test_saved_and_loaded(likelihood, tmp_path):
    make_vector_base().save_pretrained(tmp_path / "base")
    model = vector_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), likelihood=likelihood)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    expected = refined(model, stream(likelihood), queries())
    assert torch.equal(refined(loaded, stream(likelihood), queries()), expected)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "chunk_vectors" in card and "vectors of 5 numbers" in card


def lines(num: int, seed: int) -> Dataset:
    """Which side of a line through the origin of the plane, its direction drawn for each task."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(num):
        direction, x = torch.randn(2, generator=generator), torch.randn(20, 2, generator=generator)
        side = (x @ direction > 0).long().tolist()
        points = [{"vector": v, "label": float(2 * s - 1)} for v, s in zip(x.tolist(), side, strict=True)]
        rows.append({"support": points[:16], "query": points[16:]})
    return Dataset.from_list(rows)


@pytest.mark.slow
def test_the_error_falls_with_chunks(tmp_path):
    """Sides as targets -1 and 1, chunks of four points; what is learned of two chunks goes on to four."""
    model = vector_model(trained=False, likelihood="gaussian", vector_width=2, num_outputs=1, r=32)
    args = arguments(
        tmp_path, chunk_size=4, max_chunks=2, max_steps=150, learning_rate=5e-3, per_device_train_batch_size=32,
        halve_chunks=0.0, curriculum=0.0, eval_chunks=(0, 1, 2, 4), save_steps=1000,
    )  # fmt: skip
    held_out = lines(128, seed=2)
    trainer = IAITrainer(model, args, train_dataset=lines(5000, seed=1), eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss_at_chunks_4"]
    trainer.train()
    after = trainer.evaluate()
    losses = [after[f"eval_loss_at_chunks_{n}"] for n in (0, 1, 2, 4)]
    assert losses[0] < before + 0.05
    assert all(more < fewer - 0.05 for fewer, more in pairwise(losses))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_outputs": None}, "both be at least 1, or both None for text, got 5 and None"),
        ({"vector_width": 0}, "both be at least 1.* got 0 and 3"),
        ({"likelihood": "gaussian", "prediction": "latent"}, "natural parameters, got prediction='latent'"),
        ({"vector_width": None, "num_outputs": None, "likelihood": "gaussian"}, "likelihood='gaussian' has no meaning"),
    ],
)
def test_configurations_that_cannot_be(values, message):
    defaults = {"task_type": "CAUSAL_LM", "regime": "implicit", "vector_width": WIDTH, "num_outputs": CLASSES}
    with pytest.raises(ValueError, match=message):
        IAIConfig(**(defaults | values))


def test_what_cannot_be_read():
    model, support = vector_model(), stream("softmax")
    refine = lambda chunk, query=None, **kwargs: list(model.refine([chunk], query or queries(), **kwargs))  # noqa: E731
    for chunk, message in (
        ({"input_ids": torch.ones(1, 4).long()}, "vector_width=5 reads inputs_embeds"),
        (support[0] | {"inputs_embeds": torch.randn(1, 6, 4)}, r"vectors \(..., 5\), got shape \(1, 6, 4\)"),
        (support[0] | {"inputs_embeds": torch.full((1, 6, 5), float("nan"))}, "must be finite"),
        (
            support[0] | {"labels": torch.full((1, 6), 3)},
            "labels must be -100 or from 0 to 2, one for each of label_names",
        ),
        (support[0] | {"labels": torch.zeros(1, 6)}, "must be whole numbers below 3 under likelihood='softmax', got"),
        (support[0] | {"labels": None}, "need labels, one for each"),
        (
            next(chunk_vectors(*examples(40, "softmax"), chunk_size=40)),
            "a chunk of 40 tokens, a query of 1 and an answer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refine(chunk)
    with pytest.raises(ValueError, match="are for texts: num_outputs says"):
        refine(support[0], labels=[[1], [2]])
    with pytest.raises(ValueError, match=r"needs inputs_embeds \(queries, width\), got shape \(5,\)"):
        refine(support[0], {"inputs_embeds": torch.randn(5)})
    with pytest.raises(ValueError, match="a base says nothing of vectors by itself: use refine"):
        model(**queries())
    assert model.max_chunk_size == 20
    gaussian = vector_model(likelihood="gaussian")
    with pytest.raises(ValueError, match=r"must be floating targets \(..., 2\) under likelihood='gaussian'"):
        list(gaussian.refine(support, queries()))
