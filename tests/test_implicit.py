"""Regime implicit: a query's own prediction, refined by each chunk."""

import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from samples import arguments, tokenizer
from tiny import ATTENTION_FAMILIES, FAMILIES, VOCAB, WINDOW, chunks, ids, make_base, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_iai import EpisodeCollator, IAIConfig, IAITrainer
from hf_iai.objectives import Objective
from hf_iai.trainer import last_chunks

PREDICTIONS = ["logits", "probabilities", "latent"]
SINGLE, SEVERAL = [[7], [9], [30]], [[7], [9, 11], [30, 31, 32]]  # labels of one token, and of one to three
ANSWERS = {"free": {}, "three": {"num_answer_tokens": 3}, "single": {"labels": SINGLE}, "several": {"labels": SEVERAL}}
# Latents say one token at a time.
LABELLED = [(p, a) for p in PREDICTIONS for a in ("single", "several") if (p, a) != ("latent", "several")]
every_label_set = pytest.mark.parametrize(("prediction", "answers"), LABELLED)


def refiner(base="llama", **config):
    return make_model(base, regime="implicit", **config)


shared_refiner = cache(refiner)  # for checks that leave the model as it is
bare_base = cache(lambda family: make_base(family).requires_grad_(False))


def refined(model, support, query, **kwargs) -> torch.Tensor:  # (K + 1, N, ...)
    """Log probabilities of the answers before the first chunk and after each."""
    if not isinstance(query, dict):
        query = {"input_ids": query}
    return torch.stack(list(model.refine(support, query, with_start=True, **kwargs))).log_softmax(-1)


def next_token(base, *texts) -> torch.Tensor:  # (B, T) or embeddings (B, T, d) -> (B, V)
    """What plain transformers says comes next, in log probabilities."""
    embedded = [t if t.is_floating_point() else base.get_input_embeddings()(t) for t in texts]
    return base(inputs_embeds=torch.cat(embedded, 1)).logits[:, -1].log_softmax(-1)


def answer_of(base, context, label) -> torch.Tensor:  # (B, T) -> (B,)
    """log p(label | context) of plain transformers, on token ids."""
    text = torch.cat([context, torch.tensor([label]).expand(len(context), -1)], 1)
    found = base(text).logits.log_softmax(-1)[:, -len(label) - 1 : -1]
    return found.gather(2, text[:, -len(label) :, None]).sum((1, 2))


def behind(support, query):
    """Each of `support` and the query as one text, for N / B queries of a task in a row."""
    times = len(query) // len(support[0]["input_ids"])
    return [torch.cat([c["input_ids"].repeat_interleave(times, 0), query], 1) for c in support]


# ---------------------------------------------------------------- independent references


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_untrained_is_a_product_of_experts(family):
    """Chunk by chunk prior + sum (log p(answer | chunk, query) - prior), of plain transformers on token ids."""
    model, base = refiner(family, trained=False), bare_base(family)
    support, query = chunks(3), ids(4, 5, seed=1)
    prior = base(query).logits[:, -1].log_softmax(-1)
    expected = [prior]
    for text in behind(support, query):
        expected.append(expected[-1] + base(text).logits[:, -1].log_softmax(-1) - prior)
    found = refined(model, support, query)[:, :, 0]
    assert (found - torch.stack(expected).log_softmax(-1)).abs().max() < 2e-5
    assert (found[1:] - found[:-1]).abs().amax((1, 2)).min() > 0.1, "every chunk says something"


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_labels_are_a_product_of_experts(family, labels):
    model, base = refiner(family, trained=False), bare_base(family)
    support, query = chunks(2), ids(4, 5, seed=1)
    prior = torch.stack([answer_of(base, query, label) for label in labels], 1)
    expected = [prior]
    for text in behind(support, query):
        expert = torch.stack([answer_of(base, text, label) for label in labels], 1)
        expected.append(expected[-1] + expert - prior)
    found = torch.stack(list(model.refine(support, {"input_ids": query}, labels=labels, with_start=True)))
    assert (found - torch.stack(expected)).abs().max() < 2e-5


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_untrained_answers_of_several_tokens(family):
    """Token a stands behind the expected embeddings, under the prediction so far, of those before it."""
    model, base = refiner(family, trained=False), bare_base(family)
    support, query, table = chunks(2), ids(4, 5, seed=1), base.get_input_embeddings()(torch.arange(VOCAB))
    start = []
    for _ in range(3):
        start.append(next_token(base, query, *(one.exp()[:, None] @ table for one in start)))
    expected = [torch.stack(start, 1)]
    for text in behind(support, query):
        soft, after = (expected[-1].softmax(-1) @ table).split(1, 1), []
        for token in range(3):
            evidence = next_token(base, text, *soft[:token]) - next_token(base, query, *soft[:token])
            after.append(expected[-1][:, token] + evidence)
        expected.append(torch.stack(after, 1))
    found = refined(model, support, query, num_answer_tokens=3)
    assert (found - torch.stack(expected).log_softmax(-1)).abs().max() < 5e-5


@pytest.mark.parametrize("labels", [None, SINGLE], ids=["free", "labels"])
def test_untrained_probabilities_and_latents_are_means(labels):
    base, support, query = bare_base("llama"), chunks(3), ids(4, 5, seed=1)
    outputs = [base(text, output_hidden_states=True) for text in [query, *behind(support, query)]]
    experts = [out.logits[:, -1].log_softmax(-1) for out in outputs]
    if labels:
        experts = [expert[:, [token for (token,) in labels]].log_softmax(-1) for expert in experts]
    means = torch.stack([torch.stack(experts[: n + 1]).exp().mean(0).log() for n in range(4)])
    found = refined(refiner(prediction="probabilities", trained=False), support, query, labels=labels)
    assert (found.view(means.shape) - means).abs().max() < 1e-4
    hidden = [out.hidden_states[-1][:, -1] for out in outputs]
    means = torch.stack([base.lm_head(torch.stack(hidden[: n + 1]).mean(0)) for n in range(4)])
    means = means[..., [token for (token,) in labels]] if labels else means
    found = refined(refiner(prediction="latent", trained=False), support, query, labels=labels)
    assert (found.view(means.shape) - means.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_learned_is_what_the_formula_says(prediction):
    """Weight and correction of a trained adapter, of the hidden states that transformers itself gives."""
    model, support, query = refiner(prediction=prediction), chunks(2), ids(4, 5, seed=1)
    core, wrapped = model.base_model.core, model.base_model.model
    with torch.no_grad():
        core.offset.fill_(0.3)
        core.gate.fill_(0.2)

    def outlook(text, prediction):
        embedded = wrapped.get_input_embeddings()(text)
        slot = prediction.softmax(-1) @ wrapped.get_input_embeddings().weight + core.slot
        hidden = wrapped.model(inputs_embeds=torch.cat([embedded, slot[:, None]], 1)).last_hidden_state
        return hidden[:, -2], hidden[:, -1]

    def logits_of(kept):
        return {"logits": torch.clone, "probabilities": torch.log, "latent": wrapped.lm_head}[prediction](kept)

    with torch.no_grad():
        first = outlook(query, torch.zeros(4, VOCAB))[0]
        prior = wrapped.lm_head(first).log_softmax(-1)
        kept, total = {"logits": prior, "probabilities": prior.exp(), "latent": first}[prediction], torch.ones(4, 1)
        expected = [logits_of(kept).log_softmax(-1)]
        for text in behind(support, query):
            hidden, slot = outlook(text, logits_of(kept))
            norm = slot / slot.square().mean(-1, keepdim=True).sqrt()
            weight = 2 / (1 + (-(norm @ core.weight) - core.offset).exp()).unsqueeze(1)
            expert, scores = wrapped.lm_head(hidden).log_softmax(-1), core.gate * wrapped.lm_head(slot)
            if prediction == "logits":
                kept = kept + weight * (expert - prior) + scores
            elif prediction == "probabilities":
                kept = (((total * kept + weight * expert.exp()) / (total + weight)).log() + scores).softmax(-1)
            else:
                kept = (total * kept + weight * hidden) / (total + weight) + core.gate * slot
            total = total + weight
            expected.append(logits_of(kept).log_softmax(-1))
    found = refined(model, support, query)[:, :, 0]
    assert (found - torch.stack(expected)).abs().max() < 1e-4


# ---------------------------------------------------------------- batches, padding, switches


def padded(texts, left: bool) -> dict:  # of (1, T) each
    longest = max(t.shape[1] for t in texts)
    pads = [(longest - t.shape[1], 0) if left else (0, longest - t.shape[1]) for t in texts]
    pad = lambda t, p, value: torch.nn.functional.pad(t, p, value=value)  # noqa: E731
    return {
        "input_ids": torch.cat([pad(t, p, 0) for t, p in zip(texts, pads, strict=True)]),
        "attention_mask": torch.cat([pad(torch.ones_like(t), p, 0) for t, p in zip(texts, pads, strict=True)]),
    }


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_padded_batches_of_tasks_and_queries_equal_one_by_one(family):
    """Chunks longer than a sliding window, too; padding on either side, and what stands under it, has no part."""
    model = shared_refiner(family)
    texts = [[ids(1, 30, seed=s), ids(1, 17, seed=s + 5)] for s in (0, 1)]  # two chunks of two tasks
    asked = [ids(1, length, seed=length) for length in (6, 3, 4, 8)]  # two queries of each task
    for kwargs in (ANSWERS["three"], ANSWERS["several"]):
        alone = [
            refined(model, [{"input_ids": texts[k][row // 2]} for k in (0, 1)], query, **kwargs)[:, 0]
            for row, query in enumerate(asked)
        ]
        for left in (True, False):
            support = [padded(text, left) for text in texts]
            together = refined(model, support, padded(asked, left), **kwargs)
            assert (together - torch.stack(alone, 1)).abs().max() < 1e-4
    hidden = [c | {"input_ids": c["input_ids"].where(c["attention_mask"] > 0, 50)} for c in support]
    assert torch.equal(refined(model, hidden, padded(asked, left), **kwargs), together)


@every_label_set
def test_a_row_that_reads_nothing_keeps_its_prediction_bitwise(prediction, answers):
    model, query = shared_refiner(prediction=prediction), ids(4, 5, seed=1)
    support = [chunks(1)[0], {"input_ids": ids(2, 9, seed=3), "attention_mask": torch.tensor([[0] * 9, [1] * 9])}]
    _, before, after = model.refine(support, {"input_ids": query}, with_start=True, **ANSWERS[answers])
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2:], after[2:])
    _, _, again = model.refine(support, {"input_ids": query}, with_start=True, **ANSWERS[answers])
    assert torch.equal(after, again)


def test_the_chunk_is_read_once_for_all_its_queries(monkeypatch):
    model = shared_refiner()
    lengths = []
    base_type = type(model.base_model.reader.base)
    read = base_type.read
    monkeypatch.setattr(
        base_type, "read", lambda self, p, e, *rest: lengths.append(tuple(e.shape[:2])) or read(self, p, e, *rest)
    )
    list(model.refine(chunks(2), {"input_ids": ids(6, 4)}))
    assert lengths == [(6, 5), (2, 10), (6, 5), (2, 10), (6, 5)]


def test_the_bare_base_stays():
    model, query = refiner(), ids(2, 5)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=query).logits, bare_base("llama")(query).logits)
    alone = model(input_ids=query).logits[:, -1].log_softmax(-1)
    assert (alone - refined(model, [], query)[0, :, 0]).abs().max() < 1e-5, "without a chunk base and LoRA answer"
    assert model.generate(query, max_new_tokens=2, do_sample=False).shape == (2, 7)


@every_label_set
def test_bfloat16(prediction, answers):
    exact = shared_refiner(prediction=prediction)
    model = refiner(make_base().to(torch.bfloat16), prediction=prediction)
    model.load_state_dict(exact.state_dict())
    assert model.base_model.core.weight.dtype == torch.float32
    support, query = chunks(2), {"input_ids": ids(4, 5, seed=1)}
    expected, found = (list(m.refine(support, query, **ANSWERS[answers]))[-1] for m in (exact, model))
    assert found.dtype == torch.float32
    error = (found.log_softmax(-1) - expected.log_softmax(-1)).square().mean().sqrt()
    assert error < 0.1 * expected.std()


# ---------------------------------------------------------------- saving


def test_saved_and_loaded(tmp_path, prediction="latent"):
    make_base().save_pretrained(tmp_path / "base")
    base = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # noqa: E731
    model = refiner(base(), prediction=prediction)
    model.save_pretrained(tmp_path / "adapter")
    support, query = chunks(2), ids(4, 5, seed=1)
    expected = refined(model, support, query)
    for loaded in (
        PeftModel.from_pretrained(base(), tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(base(), tmp_path / "adapter", adapter_name="other"),
    ):
        assert torch.equal(refined(loaded.eval(), support, query), expected)
        assert loaded.base_model.identity.fingerprint == model.base_model.identity.fingerprint
        assert loaded.base_model.identity.name.endswith(
            f"implicit {prediction} ({model.base_model.identity.fingerprint[:8]})"
        )


# ---------------------------------------------------------------- episodes


def episode(num_chunks=3, tasks=2, queries=2, answer=2) -> dict:
    query = ids(tasks, queries, 6, seed=1)
    labels = query.clone()
    labels[..., : 6 - answer] = -100
    return {"input_ids": query, "labels": labels, "chunk_input_ids": ids(tasks, num_chunks, 8)}


def labelled_episode() -> dict:
    """Answers of one to three tokens, behind prompts of different length; one query without an answer."""
    inputs, labels = episode(), [[7, 0, 0], [9, 11, 0], [30, 31, 32]]
    for row, answer in enumerate(([7], [9, 11], [30, 31, 32])):
        inputs["input_ids"].view(4, 6)[row, 6 - len(answer) :] = torch.tensor(answer)
        inputs["labels"].view(4, 6)[row] = torch.tensor([-100] * (6 - len(answer)) + answer)
    inputs["labels"][1, 1] = -100
    label_ids = torch.tensor(labels).expand(2, 3, 3)
    return inputs | {"label_input_ids": label_ids, "label_attention_mask": (label_ids != 0).long()}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_episode_is_refined_as_its_queries_are(prediction):
    model, inputs = shared_refiner(prediction=prediction), episode()
    support = [{"input_ids": c} for c in inputs["chunk_input_ids"].unbind(1)]
    query = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "labels")}
    with torch.no_grad():
        out = model(**inputs)
    expected = refined(model, support, query)[-1]
    assert out.logits.shape == (2, 2, 2, VOCAB)
    assert (out.logits.log_softmax(-1).flatten(0, 1) - expected).abs().max() < 1e-5
    targets = inputs["input_ids"][..., -2:].flatten()
    assert (out.loss - torch.nn.functional.nll_loss(expected.flatten(0, 1), targets)).abs() < 1e-5


def test_an_episode_of_labels_is_refined_as_its_queries_are():
    model, inputs = shared_refiner(), labelled_episode()
    out = model(**inputs)
    assert out.logits.shape == (2, 2, 3)
    support = [{"input_ids": c} for c in inputs["chunk_input_ids"].unbind(1)]
    prompts = [inputs["input_ids"].view(4, 6)[row : row + 1, :length] for row, length in enumerate((5, 4, 3, 6))]
    found = torch.cat(
        [
            refined(model, [{"input_ids": c["input_ids"][[row // 2]]} for c in support], prompt, labels=SEVERAL)[-1]
            for row, prompt in enumerate(prompts)
        ]
    )
    assert (out.logits.flatten(0, 1).log_softmax(-1) - found).abs().max() < 1e-5
    assert (out.loss + found[[0, 1, 2], [0, 1, 2]].mean()).abs() < 1e-5


def test_tasks_with_sets_of_their_own():
    """A label that a task lacks is padding of the batch: it has no probability, and nothing else changes."""
    model, inputs = shared_refiner(), labelled_episode()
    expected = model(**inputs).logits
    inputs["label_attention_mask"] = inputs["label_attention_mask"].clone()
    inputs["label_attention_mask"][0, 2] = 0
    found = model(**inputs).logits
    assert torch.equal(found[1], expected[1]) and found[0].softmax(-1)[:, 2].max() == 0
    support = [{"input_ids": c[:1]} for c in inputs["chunk_input_ids"].unbind(1)]
    alone = refined(model, support, inputs["input_ids"][0, :1, :5], labels=SEVERAL[:2])[-1]
    assert (found[0, :1, :2].log_softmax(-1) - alone).abs().max() < 1e-5


@pytest.mark.parametrize("make_episode", [episode, labelled_episode])
def test_padding_of_an_episode_changes_nothing(make_episode):
    model, inputs = shared_refiner(), make_episode()
    expected, wider = model(**inputs), dict(inputs)
    for name, value in (("input_ids", 0), ("labels", -100)):  # one query more of each task, and two columns
        wider[name] = torch.nn.functional.pad(inputs[name], (0, 2, 0, 1), value=value)
    wider["attention_mask"] = torch.nn.functional.pad(torch.ones_like(inputs["labels"]), (0, 2, 0, 1))
    wider["chunk_input_ids"] = torch.nn.functional.pad(inputs["chunk_input_ids"], (0, 3, 1, 0))
    ones = torch.ones_like(inputs["chunk_input_ids"])
    wider["chunk_attention_mask"] = torch.nn.functional.pad(ones, (0, 3, 1, 0))
    out = model(**wider)
    assert (out.loss - expected.loss).abs() < 1e-5
    assert (out.logits[:, :2].log_softmax(-1) - expected.logits.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("objective", ["truncated", "greedy"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_episode_trains_everything(prediction, objective):
    model = refiner(prediction=prediction).train()
    model(**episode(), objective=Objective(objective)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@pytest.mark.parametrize("make_episode", [episode, labelled_episode])
def test_untrained_members_leave_no_parameter_unused(make_episode):
    model = refiner(trained=False).train()
    model(**make_episode(), objective=Objective("greedy")).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_unrolled_loss_is_the_mean_over_the_scored_predictions():
    model, inputs = refiner().train(), episode()
    total = model(**inputs).loss
    model.eval()
    expected = [model(**last_chunks(inputs, n)).loss for n in (0, 1, 2, 3)]
    assert (total - torch.stack(expected).mean()).abs() < 1e-5


def test_greedy_is_one_step_from_a_constant():
    """Its gradient is that of the last step alone, taken from the prediction that the steps before it gave."""
    latest = random.Random(0)
    latest.randint = lambda low, high: high
    model, inputs = refiner().train(), episode(answer=1)
    core, base = model.base_model.core, model.base_model.reader.base
    model(**inputs, objective=Objective("greedy", draw=latest)).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    asked, read = inputs["input_ids"], inputs["chunk_input_ids"]
    batch = model.base_model.reader.inputs.episode(
        (asked, torch.ones_like(asked), inputs["labels"]), (read, torch.ones_like(read), None), (None, None)
    )
    evidence = [core.read(base, c, torch.ones_like(c), c) for c in inputs["chunk_input_ids"].unbind(1)]
    start = state = core.begin(base, batch)
    with torch.no_grad():
        for chunk in evidence[:-1]:
            state = core.step(base, state, chunk)
    logits = torch.cat([core.logits(base, s) for s in (start, core.step(base, state, evidence[-1]))])
    torch.nn.functional.cross_entropy(logits[:, 0], batch.labels[:, 0].repeat(2)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - found[name]).abs().max() < 1e-6, name


def test_graph_does_not_grow_with_chunks():
    kept = []
    for num_chunks in (4, 32):
        draw = random.Random(0)
        draw.randint = lambda low, high: high  # always the last step: the longest history
        model = refiner().train()
        numbers = []
        hook = lambda t, numbers=numbers: numbers.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
            model(**episode(num_chunks), objective=Objective("greedy", draw=draw))
        kept.append(sum(numbers))
    assert kept[0] == kept[1]


# ---------------------------------------------------------------- the trainer


ASKS, SYMBOLS = 5, range(10, 18)


def favourites(num: int, seed: int) -> Dataset:
    """Eight chunks of four symbols; one symbol is drawn three times as often as any other, and asked for."""
    rng, rows = random.Random(seed), []
    for _ in range(num):
        favourite = rng.choice(SYMBOLS)
        text = rng.choices(SYMBOLS, [3.0 if symbol == favourite else 1.0 for symbol in SYMBOLS], k=8 * 4)
        query = [{"input_ids": [ASKS, favourite], "labels": [-100, favourite]}]
        rows.append({"support": [{"input_ids": text}], "query": query})
    return Dataset.from_list(rows)


def exact_match(model, episodes: Dataset, **kwargs) -> list[float]:
    """After 0, 1, ..., 8 chunks."""
    support = torch.tensor([row["support"][0]["input_ids"] for row in episodes]).split(4, 1)
    asked = torch.full((len(episodes), 1), ASKS)
    right = torch.tensor([row["query"][0]["input_ids"][1] for row in episodes])
    found = refined(model, [{"input_ids": c} for c in support], asked, **kwargs)
    answer = found.argmax(-1) + SYMBOLS[0] if kwargs else found[:, :, 0].argmax(-1)
    return (answer == right).float().mean(1).tolist()


def copying_base() -> LlamaForCausalLM:
    """One layer whose output embeddings are those of its inputs: LoRA can soon say what it has read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=WINDOW, tie_word_embeddings=True, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train_on_favourites(folder, model, labels=None) -> dict[str, float]:
    data = favourites(2000, seed=1)
    if labels is not None:
        data = data.add_column("labels", [labels] * len(data))
    args = arguments(
        folder, chunk_size=4, max_chunks=2, max_steps=60, learning_rate=2e-2, per_device_train_batch_size=32,
        halve_chunks=0.0, curriculum=0.0, eval_chunks=(0, 4), save_steps=1000,
    )  # fmt: skip
    held_out = data.select(range(64))
    trainer = IAITrainer(model, args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer())
    trainer.train()
    return trainer.evaluate()


def test_exact_match_rises_with_chunks(tmp_path):
    """It learns, and what it learns of one and two chunks goes on to eight."""
    model, held_out = refiner(copying_base(), trained=False, r=8), favourites(400, seed=3)
    assert max(exact_match(model, held_out)) < 0.1
    metrics = train_on_favourites(tmp_path, model)
    found = exact_match(model.eval(), held_out)
    assert found[0] < 0.2 < found[1] < found[4] - 0.1 < found[8] - 0.15
    assert metrics["eval_loss_at_chunks_4"] < metrics["eval_loss_at_chunks_0"] - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["probabilities", "latent"])
def test_other_predictions_learn_too(prediction, tmp_path):
    model, held_out = refiner(copying_base(), trained=False, r=8, prediction=prediction), favourites(400, seed=3)
    train_on_favourites(tmp_path, model)
    found = exact_match(model.eval(), held_out)
    assert found[0] + 0.05 < found[1]


@pytest.mark.slow
def test_labels_out_of_a_column_train(tmp_path):
    """Strings, as the tokenizer has them: `w10` is token 10."""
    model, held_out = refiner(copying_base(), trained=False, r=8), favourites(200, seed=3)
    labels = [[symbol] for symbol in SYMBOLS]
    metrics = train_on_favourites(tmp_path, model, labels)
    assert metrics["eval_loss_at_chunks_4"] < metrics["eval_loss_at_chunks_0"] - 0.1
    found = exact_match(model.eval(), held_out, labels=labels)
    assert found[0] < 0.2 < found[1] < found[8] - 0.1


def test_the_collator_makes_label_sets():
    """Strings end as completions do; sets of different size and length are padded; ids stay as they are."""
    query = {"prompt": "w3 w4", "completion": " w6 w7"}
    rows = [{"support": [{"text": "w9 w9"}], "query": [query], "labels": labels} for labels in (["w6 w7", "w5"], [[8]])]
    batch = EpisodeCollator(tokenizer(), chunk_size=4)(rows)
    assert batch["label_input_ids"].tolist() == [[[6, 7, 2], [5, 2, 0]], [[8, 0, 0], [0, 0, 0]]]
    assert batch["label_attention_mask"].tolist() == [[[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [0, 0, 0]]]
    out = shared_refiner()(**EpisodeCollator(tokenizer(), chunk_size=4)(rows[:1]))
    assert out.logits.shape == (1, 1, 2)
    with pytest.raises(ValueError, match="some episodes of the batch have labels and others have none"):
        EpisodeCollator(tokenizer(), chunk_size=4)([rows[0], {name: rows[1][name] for name in ("support", "query")}])


# ---------------------------------------------------------------- errors


def test_there_is_no_task_state():
    model, query = shared_refiner(), ids(2, 5)
    state = make_model().adapt(chunks(1))
    for call in (
        lambda: model.adapt(chunks(1)),
        lambda: next(model.adapt_steps(chunks(1))),
        lambda: model.initial_state(),
        lambda: model(input_ids=query, task_state=state),
        lambda: model.generate(query, task_state=state),
        lambda: model.using(state).__enter__(),
    ):
        with pytest.raises(ValueError, match="regime='implicit' does not have: the state belongs to the query.*refine"):
            call()
    with pytest.raises(ValueError, match="refine needs regime='implicit'.*got 'explicit': use adapt"):
        make_model().refine(chunks(1), {"input_ids": query})


@pytest.mark.parametrize(
    ("query", "kwargs", "message"),
    [
        ({"input_ids": ids(5)}, {}, r"input_ids \(queries, tokens\), got shape \(5,\)"),
        ({"input_ids": torch.full((1, 2), VOCAB)}, {}, "do not fit a vocabulary"),
        ({"input_ids": ids(2, 5)}, {"labels": [[3]]}, r"two or more lists of token ids.*got \[\[3\]\]"),
        ({"input_ids": ids(2, 5)}, {"labels": [[3], []]}, "none of them empty"),
        ({"input_ids": ids(2, 5)}, {"labels": [[3], [3]]}, "no two alike"),
        ({"input_ids": ids(2, 5)}, {"labels": [[3], [VOCAB]]}, "do not fit a vocabulary"),
        ({"input_ids": ids(2, 5)}, {"labels": SINGLE, "num_answer_tokens": 2}, "got num_answer_tokens=2 too"),
        ({"input_ids": ids(2, 5)}, {"num_answer_tokens": 0}, "num_answer_tokens must be at least 1, got 0"),
        ({"input_ids": ids(2, 5), "labels": ids(2, 4)}, {}, r"queries \(2, 5\) must have their shape, got \(2, 4\)"),
        (
            {"input_ids": ids(1, 3), "labels": torch.tensor([[-100, 5, -100]])},
            {},
            "labelled tokens are its answer, which must be its last tokens",
        ),
    ],
)
def test_queries_that_cannot_be(query, kwargs, message):
    with pytest.raises(ValueError, match=message):
        shared_refiner().refine(chunks(1), query, **kwargs)


def test_chunks_that_cannot_be():
    model, query = shared_refiner(), {"input_ids": ids(3, 5)}
    with pytest.raises(ValueError, match="3 queries for a chunk of 2 tasks"):
        next(model.refine(chunks(1), query))
    most = WINDOW - 5 - 2
    list(model.refine([{"input_ids": ids(1, most)}], query, num_answer_tokens=2))
    with pytest.raises(ValueError, match=f"{most + 1} tokens, a query of 5 and an answer of 2.* chunk_size <= {most}"):
        list(model.refine([{"input_ids": ids(1, most + 1)}], query, num_answer_tokens=2))
    assert model.max_chunk_size == WINDOW // 2
    inputs = episode()
    with pytest.raises(ValueError, match=f"a chunk of {WINDOW} tokens, a query of 4 and an answer of 2 do not fit"):
        model(**inputs | {"chunk_input_ids": ids(2, 1, WINDOW)})
    with pytest.raises(ValueError, match="needs labels"):
        model(**inputs | {"labels": None})
    with pytest.raises(ValueError, match=r"answer of query 0 is tokens .*, none of its labels \[\[7\], \[9\]\]"):
        model(**inputs | {"label_input_ids": torch.tensor([[[7], [9]]] * 2)})
    with pytest.raises(ValueError, match=r"must be \(tasks, labels, tokens\), got \(2, 3\)"):
        model(**inputs | {"label_input_ids": ids(2, 3)})
    with pytest.raises(ValueError, match="says one token at a time, but a label has 3"):
        shared_refiner(prediction="latent").refine(chunks(1), query, labels=SEVERAL)


def test_bases_that_cannot_be():
    with pytest.raises(ValueError, match="needs keys and values in every layer, which 'mamba' does not"):
        refiner("mamba")
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    encoder = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="BertForSequenceClassification is .*load the base with AutoModelForCausalLM"):
        get_peft_model(encoder, IAIConfig(task_type="CAUSAL_LM", regime="implicit", target_modules=["query"]))


@pytest.mark.parametrize(
    ("values", "missing"), [({"kl_weight": 0.5}, "teacher"), ({"state_learning_rate": 0.1}, r"learned theta\(0\)")]
)
def test_what_the_trainer_cannot_do(values, missing, tmp_path):
    with pytest.raises(ValueError, match=f"regime='implicit' has no {missing}, got .*: leave it out"):
        IAITrainer(refiner(), arguments(tmp_path, **values), processing_class=tokenizer())


def test_the_card_says_how_to_refine(tmp_path):
    model = refiner()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Prediction: kept as logits" in card and "model.refine(" in card and "adapt(" not in card


def test_the_examples_of_the_documentation_run(capsys):
    """Untrained, it has read what the base does not know."""
    page = (Path(__file__).parent.parent / "docs" / "implicit.md").read_text()
    texts, vectors = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(texts, "implicit.md", "exec"), names := {})
    assert names["logits"].argmax(-1).tolist() == [1]
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(names["chunks"]) + 1
    exec(compile(vectors, "implicit.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([5, 3])\n" * 5
