"""Trainer, objectives, checkpointing: what moves, what repeats, what it costs."""

import random
from itertools import product

import pytest
import torch
from datasets import Dataset
from samples import CHUNK, CHUNKS, arguments, episodes, tokenizer
from tiny import REGIMES, STATES, VARIANTS, ids, make_base, make_model

from hf_iai import IAIConfig, IAITrainer
from hf_iai.evaluation import evaluate_curve
from hf_iai.objectives import Objective
from hf_iai.trainer import last_chunks


def train(folder, resume=None, model=None, **values):
    model = model or make_model(trained=False)
    trainer = IAITrainer(model, arguments(folder, **values), train_dataset=episodes(), processing_class=tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}, losses


@pytest.mark.parametrize(
    ("state_type", "regime", "objective"),
    [
        pytest.param(s, r, o, marks=[] if (s, r) == ("prefix", "explicit") else pytest.mark.slow)
        for s, r, o in product([*STATES, *VARIANTS], REGIMES, ["unrolled", "truncated", "greedy"])
    ],
)
def test_the_trainer_moves_every_parameter(tmp_path, state_type, regime, objective):
    model = make_model(trained=False, state_type=state_type, regime=regime)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    after, _ = train(tmp_path, model=model, objective=objective, max_steps=12)
    assert before.keys() == after.keys()
    assert [name for name in after if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("regime", ["explicit", "parametric"])
@pytest.mark.parametrize("state_type", STATES)
def test_recent_trains_without_unused_parameters(tmp_path, state_type, regime):
    model = make_model(trained=False, state_type=state_type, regime=regime, accumulation="recent")
    model.train()(**last_chunks(batch(), 1)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_recurrent_base_trains_and_is_evaluated(tmp_path):
    model = make_model("mamba", trained=False, state_type="prompt")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    after, _ = train(tmp_path, model=model, kl_weight=0.5, max_steps=3)
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    curve = evaluate_curve(model, episodes(4), num_chunks=[0, 2], chunk_size=CHUNK, baselines=["full_context"])
    assert curve.counts("iai") == curve.counts("full_context") == [0, 2]
    with pytest.raises(ValueError, match="pass chunk_size"):
        train(tmp_path, model=model, chunk_size=None)


@pytest.mark.parametrize("state_rate", [None, 3e-2])
def test_training_twice_and_resuming_are_identical(tmp_path, state_rate):
    once, losses = train(tmp_path / "a", state_learning_rate=state_rate)
    twice, again = train(tmp_path / "b", state_learning_rate=state_rate)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed, rest = train(tmp_path / "c", resume=checkpoint, state_learning_rate=state_rate)
    assert losses == again and losses[3:] == rest[-3:]
    for name in once:
        assert torch.equal(once[name], twice[name]), name
        assert torch.equal(once[name], resumed[name]), name


@pytest.mark.parametrize("state_type", STATES)
def test_the_start_of_the_state_has_a_rate_of_its_own(tmp_path, state_type):
    """Adam's first step is as long as the rate."""
    model = make_model(trained=False, state_type=state_type)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    values = {"lr_scheduler_type": "constant", "max_steps": 1, "learning_rate": 1e-3, "state_learning_rate": 1e-2}
    after, _ = train(tmp_path, model=model, **values)
    for name in after:
        step = (after[name] - before[name]).abs().max().item()
        if ".start." in name:
            assert abs(step - 1e-2) < 5e-4, name
        else:  # what lies behind zero weights has no gradient yet, or only rounding errors
            assert step < 1.05e-3, name
    assert any(torch.isclose((after[n] - before[n]).abs().max(), torch.tensor(1e-3), rtol=0.05) for n in after)


def test_a_rate_of_theta_0_that_cannot_be_honoured_is_refused(tmp_path):
    model = make_model(trained=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers= brings its own rates"):
        IAITrainer(
            model,
            arguments(tmp_path, state_learning_rate=0.1),
            train_dataset=episodes(),
            processing_class=tokenizer(),
            optimizers=(optimizer, None),
        )


def test_training_lowers_the_loss(tmp_path):
    """Text of 8 of the 97 tokens: there is something to learn."""
    rows = torch.randint(5, 13, (64, 2 * CHUNK), generator=torch.Generator().manual_seed(3))
    rows = Dataset.from_dict(
        {
            "support": [[{"input_ids": row[:CHUNK].tolist()}] for row in rows],
            "query": [[{"input_ids": row[CHUNK:].tolist()}] for row in rows],
        }
    )
    args = arguments(tmp_path, max_steps=100, learning_rate=3e-2, max_chunks=1, halve_chunks=0.0, eval_chunks=(0, 1))
    trainer = IAITrainer(
        make_model(trained=False), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer()
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for n in (0, 1):
        assert after[f"eval_loss_at_chunks_{n}"] < before[f"eval_loss_at_chunks_{n}"] - 0.3
    assert after["eval_loss_at_chunks_1"] == pytest.approx(after["eval_loss"], abs=1e-4)


def test_evaluate_logs_the_curve(tmp_path):
    trainer = IAITrainer(make_model(), arguments(tmp_path), eval_dataset=episodes(), processing_class=tokenizer())
    metrics = trainer.evaluate()
    assert [k for k in metrics if "chunks" in k] == [f"eval_loss_at_chunks_{n}" for n in (0, 1, 2, 4)]
    assert metrics["eval_loss_at_chunks_4"] == pytest.approx(metrics["eval_loss"], abs=1e-4)


def test_model_id_and_peft_config(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    config = IAIConfig(task_type="CAUSAL_LM", num_state_tokens=2, target_modules="all-linear")
    args = arguments(tmp_path / "out", max_steps=1)
    trainer = IAITrainer(str(tmp_path / "base"), args, train_dataset=episodes(), peft_config=config)
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()


def batch(num_chunks: int = CHUNKS, tasks: int = 2, queries: int = 2) -> dict[str, torch.Tensor]:
    query = ids(tasks, queries, CHUNK, seed=1)
    return {"input_ids": query, "labels": query, "chunk_input_ids": ids(tasks, num_chunks, CHUNK)}


def test_unrolled_loss_is_the_mean_over_the_scored_states():
    model, inputs = make_model(), batch(num_chunks=3, queries=1)
    for module in model.modules():  # training mode decides the objective; nothing in this base drops out
        module.training = True
    total = model(**inputs).loss
    model.eval()
    expected = [model(**last_chunks(inputs, n)).loss for n in (0, 1, 2, 3)]
    assert (total - torch.stack(expected).mean()).abs() < 1e-5


def test_loss_after_all_chunks_alone():
    model, inputs = make_model(), batch(num_chunks=3, queries=1)
    for module in model.modules():
        module.training = True
    total = model(**inputs, objective=Objective("unrolled", scored_states="last")).loss
    model.eval()
    expected = [model(**last_chunks(inputs, n)).loss for n in (0, 3)]
    assert (total - torch.stack(expected).mean()).abs() < 1e-5


@pytest.mark.parametrize(("objective", "last"), [("truncated", 3), ("truncated", 1), ("greedy", 3), ("greedy", 1)])
def test_chunks_before_the_window_are_read_too(objective, last):
    """The state after the last 1 or 3 chunks is scored, whatever part of them has gradient."""
    model, inputs, draw = make_model(), batch(num_chunks=3, queries=1), random.Random(0)
    draw.randint = lambda low, high: last
    for module in model.modules():
        module.training = True
    total = model(**inputs, objective=Objective(objective, window=2, draw=draw)).loss
    model.eval()
    expected = [model(**last_chunks(inputs, n)).loss for n in (0, last)]
    assert (total - torch.stack(expected).mean()).abs() < 1e-5


@pytest.mark.parametrize("objective", ["unrolled", "truncated", "greedy"])
def test_without_a_chunk_the_start_is_scored(objective):
    model, inputs = make_model(), batch(num_chunks=3)
    inputs["chunk_input_ids"] = inputs["chunk_input_ids"][:, :0]
    for module in model.modules():
        module.training = True
    found = model(**inputs, objective=Objective(objective)).loss
    query, labels = inputs["input_ids"].flatten(0, 1), inputs["labels"].flatten(0, 1)
    start = model.initial_state(len(query))
    assert (found - model(input_ids=query, labels=labels, task_state=start).loss).abs() < 1e-5


def test_fewest_chunks_of_a_step(tmp_path):
    args = arguments(tmp_path, min_chunks=3, curriculum=0.0, halve_chunks=0.0)
    trainer = IAITrainer(make_model(), args, train_dataset=episodes(), processing_class=tokenizer())
    assert {trainer._draw_num_chunks(random.Random(i)) for i in range(200)} == {3, 4}


def test_greedy_gives_gradient_to_one_chunk_only():
    """Earlier read-outs are constants: the gradient equals that of the last step on a frozen state."""
    model, inputs = make_model().train(), batch(num_chunks=3, queries=1)
    saved = []
    hook = lambda t: saved.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        model(**inputs, objective=Objective("greedy", draw=random.Random(1)))
    few = sum(saved)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        model(**inputs)
    assert few < sum(saved)


@pytest.mark.parametrize("state_type", ["prefix", "kept"])
@pytest.mark.parametrize("objective", ["greedy", "truncated"])
def test_graph_does_not_grow_with_chunks(objective, state_type):
    """Numbers kept for the backward pass, counted as autograd saves them."""
    kept = []
    for num_chunks in (4, 32):
        model = make_model(state_type=state_type).train()
        fixed = random.Random(0)
        fixed.randint = lambda low, high: high  # always the last step: the longest history
        numbers = []
        hook = lambda t, numbers=numbers: numbers.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
            model(**batch(num_chunks), objective=Objective(objective, window=2, draw=fixed))
        kept.append(sum(numbers))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("num_chunks", [CHUNKS, 40])
def test_kl_to_the_full_context_teacher(num_chunks):
    """The teacher sees all chunks, or of more than fit its window the last tokens."""
    model, inputs = make_model().train(), batch(num_chunks)
    losses = []
    for weight in (0.0, 1.0):
        losses.append(model(**inputs, objective=Objective("unrolled", kl_weight=weight)).loss)
    base_logits = []
    context = inputs["chunk_input_ids"].flatten(1).repeat_interleave(2, 0)[:, -(model.window - CHUNK) :]
    query = inputs["input_ids"].flatten(0, 1)
    with torch.no_grad(), model.disable_adapter():
        base_logits = model.base_model.model(torch.cat([context, query], 1)).logits[:, -CHUNK:]
    student = model(**inputs).logits.flatten(0, 1)
    p, q = base_logits[:, :-1].log_softmax(-1), student[:, :-1].log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert (losses[1] - losses[0] - expected).abs() < 1e-4
