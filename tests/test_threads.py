"""One model, many threads: every thread gets the answers that it would get alone."""

import contextvars
import threading
import time

import pytest
import torch
from members import READING
from tiny import make_model

SECONDS = 1.5
# One member of each type of state, and ways of reading that switch LoRA or take gradients.
TYPES = {
    "text-prefix-observations-explicit", "text-prefix-observations-parametric", "text-prompt-observations-parametric",
    "text-prompt-learned_optimizer-parametric", "text-lora-observations-explicit", "text-lora-sgd-parametric",
    "text-lora-both-explicit", "text-memory", "text-memory-parametric", "text-attention", "vectors-mlp-softmax",
}  # fmt: skip
FAST = {"text-prefix-observations-parametric", "text-lora-sgd-parametric", "text-memory", "text-attention"}
MEMBERS = [m for m in READING if m.id in TYPES or m.kind.name.startswith("classes")]


def jobs_of(member, model) -> list:
    """Functions that give tensors: answers under two states, under `using`, without a state, and reading."""
    states = [model.adapt(member.stream(seed)) for seed in (0, 1)]
    queries, stream = member.queries(), member.stream(2)

    def used():
        with torch.no_grad(), model.using(states[1]):
            return model(**queries).logits

    def read():
        return torch.cat([t.double().flatten() for t in model.adapt(stream).tensors.values()])

    jobs = [lambda s=state: member.answer_under(model, s, queries) for state in states]
    jobs += [used, read, read, jobs[0], used, jobs[1]]
    return jobs


def run_together(jobs, seconds: float) -> tuple[int, list[str]]:
    """How many answers there were, and what was wrong with those that differ from the answers alone."""
    alone, wrong, count, end = [job() for job in jobs], [], [0], time.monotonic() + seconds

    def work(job, expected):
        while time.monotonic() < end and len(wrong) < 5:
            try:
                found, count[0] = job(), count[0] + 1
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            except Exception as error:
                wrong.append(repr(error)[:300])

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count[0], wrong


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.id in FAST], ids=lambda m: m.id)
def test_threads(member):
    count, wrong = run_together(jobs_of(member, member.model()), SECONDS)
    assert not wrong and count >= 8, wrong


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.id)
def test_eight_threads_for_half_a_minute(member):
    count, wrong = run_together(jobs_of(member, member.model()), 30.0)
    assert not wrong and count > 8, wrong


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_hooks_come_back_after_threads(training):
    member = next(m for m in MEMBERS if m.id == "text-memory")
    model = member.model().train(training)
    _, wrong = run_together(jobs_of(member, model)[3:5], 0.5)
    assert not wrong and {module.training for module in model.modules()} == {training}
    assert not any(module._forward_hooks for module in model.modules())


def test_using_holds_for_its_thread_and_for_what_is_started_with_its_context():
    model = make_model()
    query = {"input_ids": torch.tensor([[5, 6, 7]])}
    state = model.adapt([{"input_ids": torch.arange(5, 15)[None]}])
    with torch.no_grad():
        bare, under = model(**query).logits, model(**query, task_state=state).logits
        found = {}

        def ask(name):
            with torch.no_grad():
                found[name] = model(**query).logits

        with model.using(state):
            context = contextvars.copy_context()
            threads = [
                threading.Thread(target=ask, args=("plain",)),
                threading.Thread(target=context.run, args=(ask, "with context")),
            ]
            for thread in threads:
                thread.start()
                thread.join()
            ask("own")
    assert torch.equal(found["plain"], bare)
    assert torch.equal(found["with context"], under) and torch.equal(found["own"], under)


def test_two_models_under_using():
    one, two = make_model(), make_model(num_state_tokens=3)
    query = {"input_ids": torch.tensor([[5, 6, 7]])}
    chunk = [{"input_ids": torch.arange(5, 15)[None]}]
    states = [model.adapt(chunk) for model in (one, two)]
    with torch.no_grad(), one.using(states[0]), two.using(states[1]):
        for model, state in zip((one, two), states, strict=True):
            assert torch.equal(model(**query).logits, model(**query, task_state=state).logits)
