"""What every member must satisfy, whatever it reads and however its state is refined; see members.py."""

import re
from dataclasses import replace
from functools import cache
from itertools import count, islice

import pytest
import torch
from members import READING, REFINING, Member, every
from peft import PeftModel
from torch import Tensor

from hf_iai import TaskState, export_classifier, export_to_peft

EVERY, GENERATING = every(READING + REFINING), every(m for m in READING if m.kind.generates)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@cache
def shared(member: Member):
    """An adapter for checks that leave it as it is."""
    return member.model()


@cache
def untrained(member: Member):
    return member.model(trained=False)


@cache
def usual_state(member: Member) -> TaskState:
    """Of the shared adapter, after the usual stream."""
    return shared(member).adapt(member.stream())


@cache
def usual_answer(member: Member) -> Tensor:
    """To the usual queries after the usual stream."""
    if member.kind.refines:
        return member.answer(shared(member), member.stream(), member.queries())
    return member.answer_under(shared(member), usual_state(member), member.queries())


def assert_close(found: Tensor, expected: Tensor, rounding: float) -> None:
    """Up to rounding of the largest value, or of 1; whole numbers are the same."""
    assert found.shape == expected.shape
    if not found.is_floating_point():
        assert torch.equal(found, expected)
    elif found.numel():
        scale = max(1.0, expected.abs().max().item())
        assert (found - expected).abs().max() <= rounding * scale


def assert_states_close(found: TaskState, expected: TaskState, rounding: float) -> None:
    assert torch.equal(found.step, expected.step) and torch.equal(found.num_tokens, expected.num_tokens)
    assert found.class_names == expected.class_names and found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        assert_close(tensor, expected.tensors[name], rounding)


def assert_states_equal(found: TaskState, expected: TaskState) -> None:
    """Bitwise."""
    assert_states_close(found, expected, 0.0)
    assert all(torch.equal(t, expected.tensors[name]) for name, t in found.tensors.items())


def padded(inputs: dict, left: int, right: int, fill: float = 1) -> dict:
    """Tokens and examples more, with `fill` under a mask of 0; of NaN whole numbers are 2."""

    def wider(name: str, tensor: Tensor) -> Tensor:
        axes = [1] if tensor.dim() > 1 else []
        axes += [2] if tensor.dim() == 3 and name in ("input_ids", "attention_mask") else []  # tokens of examples
        pads = [(left, right) if axis in axes else (0, 0) for axis in range(tensor.dim())]
        hidden = fill if tensor.is_floating_point() or fill == 1 else 2
        value = 0 if name == "attention_mask" else hidden
        return torch.nn.functional.pad(tensor, [n for pad in reversed(pads) for n in pad], value=value)

    return {name: wider(name, t) if isinstance(t, Tensor) else t for name, t in inputs.items()}


def beside_longer(inputs: dict, left: int, right: int, fill: float) -> tuple[dict, dict]:
    """`inputs` padded, with rows below in which all of the padding counts; and those rows alone."""
    short = padded(inputs, left, right, fill)
    longer = padded(inputs, left, right) | {"attention_mask": torch.ones_like(short["attention_mask"])}
    together = {name: torch.cat([t, longer[name]]) if isinstance(t, Tensor) else t for name, t in short.items()}
    return together, longer


def of_task(queries: dict, task: int, num_tasks: int = 2) -> dict:
    return {name: t.chunk(num_tasks)[task] for name, t in queries.items()}


# ---------------------------------------------------------------- saving and loading


@EVERY
def test_a_saved_adapter_is_the_same(member, tmp_path):
    model, stream, queries = shared(member), member.stream(), member.queries()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(member.base(), tmp_path).eval()
    if member.kind.refines:
        assert torch.equal(member.answer(loaded, stream, queries), usual_answer(member))
    else:
        assert_states_equal(loaded.adapt(stream), usual_state(member))
        assert torch.equal(member.answer_under(loaded, usual_state(member), queries), usual_answer(member))
    assert loaded.base_model.identity == model.base_model.identity
    assert loaded.base_model.identity.name == model.base_model.identity.name


@every(READING)
def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(member, tmp_path):
    model, (first, *rest) = shared(member), member.stream()
    part = model.adapt([first])
    part.save_pretrained(tmp_path)
    loaded = TaskState.from_pretrained(tmp_path)
    assert_states_equal(loaded, part)
    assert loaded.identity == part.identity and loaded.accumulation == part.accumulation
    assert_states_equal(model.adapt(rest, state=loaded), usual_state(member))


# ---------------------------------------------------------------- batches and padding


@EVERY
def test_padding_changes_nothing(member):
    """On the left or right, beside longer rows; what stands under the mask does not count, bitwise."""
    model, stream, queries = shared(member), member.stream(), member.queries(2)
    alone = member.answer(model, stream, of_task(queries, 0))
    for pads in ((0, 3), (3, 0)):
        together, longer = zip(*(beside_longer(chunk, *pads, fill=1) for chunk in stream), strict=True)
        found = member.answer(model, together, queries)
        assert_close(found.chunk(2)[0], alone, member.rounding)
        assert_close(found.chunk(2)[1], member.answer(model, longer, of_task(queries, 1)), member.rounding)
    other = [beside_longer(chunk, *pads, fill=torch.nan)[0] for chunk in stream]
    assert torch.equal(member.answer(model, other, queries), found)


@every(m for m in READING + REFINING if "input_ids" in m.queries())  # a vector has no padding
def test_padding_of_queries_changes_nothing(member):
    """On the left or right, beside longer ones."""
    queries, num = member.queries(), member.per_task
    for left in (0, 3):
        wider, _ = beside_longer(queries, left, 3 - left, fill=1)
        if member.kind.refines:  # the answer stands last
            wider["attention_mask"][num:, left + queries["labels"].shape[1] :] = 0
            wider["labels"] = wider["labels"].where(wider["attention_mask"] > 0, -100)
            wider["labels"][:, :left] = -100
            found = member.answer(shared(member), member.stream(), wider)
        else:
            found = member.answer_under(shared(member), usual_state(member), wider)
        if member.kind.generates:  # a text has logits of all its tokens
            found = found[:, left : left + queries["input_ids"].shape[1]]
        assert_close(found[:num], usual_answer(member), member.rounding)


# Of tasks side by side the second has shorter chunks, and ends first.
UNEQUAL = (8, 8, 5), (5, 7)


@every(READING)
def test_tasks_side_by_side_are_as_if_alone(member):
    """One that has ended keeps its state, bitwise."""
    model, queries = shared(member), member.queries(2)
    streams = [member.stream(seed, sizes) for seed, sizes in enumerate(UNEQUAL)]
    alone = [model.adapt(stream) for stream in streams]
    *_, before, after = model.adapt_steps(member.kind.batch(streams))
    assert before.step.tolist() == [2, 2] and after.step.tolist() == [3, 2]
    assert_states_equal(after.select(1), before.select(1))
    assert any(not torch.equal(t, before.select(0).tensors[name]) for name, t in after.select(0).tensors.items())
    assert_states_close(after, TaskState.stack(alone), member.rounding)
    assert_states_close(model.adapt(member.kind.batch(streams), parallel=2), after, member.rounding)
    answers = [member.answer_under(model, state, of_task(queries, task)) for task, state in enumerate(alone)]
    assert_close(member.answer_under(model, after, queries), torch.cat(answers), member.rounding)
    # One state for all queries.
    assert_close(member.answer_under(model, alone[0], queries).chunk(2)[0], answers[0], member.rounding)


@every(REFINING)
def test_predictions_side_by_side_are_as_if_alone(member):
    """Those of a task that has ended stay, bitwise."""
    model, queries = shared(member), member.queries(2)
    streams = [member.stream(seed, sizes) for seed, sizes in enumerate(UNEQUAL)]
    alone = [member.answer(model, stream, of_task(queries, task)) for task, stream in enumerate(streams)]
    *_, before, after = member.answers(model, member.kind.batch(streams), queries)
    assert_close(after, torch.cat(alone), member.rounding)
    assert torch.equal(after.chunk(2)[1], before.chunk(2)[1]) and not torch.equal(after.chunk(2)[0], before.chunk(2)[0])


@every(READING)
def test_a_state_is_a_value(member):
    model = shared(member)
    state = model.adapt(member.kind.batch([member.stream(1), member.stream(2)]))
    assert_states_equal(TaskState.stack([state.select(0), state.select(-1)]), state)
    copy = state.clone()
    for tensor in copy.tensors.values():
        tensor.zero_()
    assert any(t.any() for t in state.tensors.values())
    assert state.to("cpu").nbytes == state.nbytes == sum(t.numel() * t.element_size() for t in state.tensors.values())
    with pytest.raises(IndexError, match="task 2 of a state of 2"):
        state.select(2)
    start = model.initial_state()
    for tensor in start.tensors.values():
        tensor.fill_(7)
    assert not any((t == 7).all() for t in model.initial_state().tensors.values() if t.numel())


@every(READING)
def test_states_that_were_read_apart_merge(member):
    """Untrained, so that nothing depends on the order, or the other states read so far."""
    model, stream = untrained(member), member.stream()
    apart = [model.adapt([chunk]) for chunk in stream]
    if not member.merges:
        with pytest.raises(ValueError, match=f"'average' or 'sums' merge, got '{apart[0].accumulation}'"):
            TaskState.merge(apart)
        return
    merged, read = TaskState.merge(apart), model.adapt(stream)
    if member.fits:
        sums = ("count", "total", "moment")
        merged, read = (replace(s, tensors={name: s.tensors[name] for name in sums}) for s in (merged, read))
    assert_states_close(merged, read, member.rounding)


@every(m for m in READING + REFINING if not m.has_order)
def test_order_is_only_learned(member):
    model, stream, queries = untrained(member), member.stream(), member.queries()
    forward, backward = (member.answer(model, chunks, queries) for chunks in (stream, stream[::-1]))
    if member.kind.refines and forward.dim() == 3:  # later tokens stand behind what the first ones are thought to be
        forward, backward = forward[:, 0], backward[:, 0]
    assert_close(backward, forward, 0.05 if member.fits else member.rounding)


# ---------------------------------------------------------------- reading and answering


@EVERY
def test_reading_keeps_neither_modes_nor_gradients(member):
    model, stream, queries, steps = shared(member), member.stream(), member.queries(), []
    model.train()
    model.get_input_embeddings().eval()  # modes that differ
    modes = [module.training for module in model.modules()]
    if member.kind.refines:
        results = list(model.refine(iter(stream), queries))
    else:
        state = model.adapt(iter(stream), on_step=steps.append)
        assert [s.step.tolist() for s in steps] == [[1], [2]]
        assert state.num_tokens.item() == sum(int(chunk["attention_mask"].sum()) for chunk in stream)
        results = [t for s in (state, model.initial_state()) for t in s.tensors.values()]
    assert modes == [module.training for module in model.modules()] and torch.is_grad_enabled()
    assert not any(t.requires_grad for t in results) and all(p.grad is None for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        assert torch.equal(member.answer(model, member.stream(), queries), usual_answer(member))
    assert not [m for m in model.modules() if m._forward_hooks], "hooks are left behind"


@EVERY
def test_an_endless_stream_is_read_as_it_comes(member):
    """The model may be used in between."""
    model, drawn = shared(member), []

    def endless():
        for seed in count():
            drawn.append(seed)
            yield member.stream(seed, (6,))[0]

    if member.kind.refines:
        results = ([logits] for logits in model.refine(endless(), member.queries()))
    else:
        results = (state.tensors.values() for state in model.adapt_steps(endless()))
    for number, tensors in enumerate(islice(results, 4), 1):
        assert all(t.isfinite().all() for t in tensors) and torch.is_grad_enabled() and len(drawn) == number


@EVERY
@pytest.mark.parametrize("num_chunks", [0, 2])
def test_an_episode_is_reading_and_then_answering(member, num_chunks):
    model, episode, losses = shared(member), member.episode(num_chunks), []
    with torch.no_grad():
        out = model(**episode)
    assert out.loss.isfinite()
    names = [name for name in episode if f"chunk_{name}" in episode]
    for task in (0, 1):
        chunks = [{n: episode[f"chunk_{n}"][task : task + 1, k] for n in names} for k in range(num_chunks)]
        queries = {name: episode[name][task] for name in member.queries()}
        if member.kind.refines or not chunks:
            expected = member.answer(model, chunks, queries)
        else:
            with torch.no_grad():
                one = model(**queries, labels=episode["labels"][task], task_state=model.adapt(chunks))
            expected = one.logits
            losses.append(one.loss)
        # Classes that no chunk has shown have no column.
        assert_close(member.scores(out.logits[task])[:, : expected.shape[1]], expected, member.rounding)
    if losses:
        assert_close(out.loss, torch.stack(losses).mean(), member.rounding)


@GENERATING
def test_generated_tokens_are_those_of_the_logits(member):
    """With or without a cache, padded on the left or not, of several tasks or of one, greedily or by beams."""
    model, queries = shared(member), member.queries(2)
    ids = queries["input_ids"]
    state = model.adapt(member.kind.batch([member.stream(1), member.stream(2)]))
    few = {"max_new_tokens": 3} | GREEDY
    expected = ids
    for _ in range(3):
        expected = torch.cat([expected, model(input_ids=expected, task_state=state).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, task_state=state, **few), expected)
    left = padded(queries, 2, 0)
    with model.using(state):
        assert torch.equal(model.generate(**left, **few)[:, 8:], expected[:, 6:])
    beams = few | {"num_beams": 2}
    alone = [model.generate(ids[i : i + 1], task_state=state.select(i), **beams) for i in (0, 1)]
    assert torch.equal(model.generate(ids, task_state=state, **beams), torch.cat(alone))
    assert not [m for m in model.modules() if m._forward_hooks], "hooks are left behind"


@every(READING)
def test_an_export_answers_alike(member, tmp_path):
    model, state = shared(member), usual_state(member)
    if not member.exports:
        for export in (export_to_peft, export_classifier):
            with pytest.raises(ValueError):
                export(model, state, tmp_path / "export")
        return
    member.kind.export(model, state, tmp_path / "export")
    plain = member.kind.load_export(tmp_path / "export").eval()
    expected = usual_answer(member)
    with torch.no_grad():
        found = plain(**member.queries()).logits[:, -expected.shape[1] :]  # virtual tokens have logits too
    assert (found - expected).abs().max() < 2e-4


# ---------------------------------------------------------------- training


def loss_and_gradients(model, episode: dict) -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(0)  # encoders drop out
    model.zero_grad()
    loss = model.train()(**episode).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def unreached(member: Member, gradients: dict[str, Tensor | None], zero: bool = True) -> list[str]:
    """Which parameters have no gradient, though they should; `zero`: one of 0 is none."""
    none = [n for n, g in gradients.items() if g is None or (zero and not g.any())]
    return [name for name in none if not re.search(member.unreached, name)]


@EVERY
def test_everything_trains(member):
    """No parameter is unused before anything is learned, as data-parallel training asks; then a step moves all."""
    episode = member.episode()
    loss, gradients = loss_and_gradients(member.model(trained=False), episode)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values() if g is not None)
    assert unreached(member, gradients, zero=False) == []
    model = member.model()
    loss, gradients = loss_and_gradients(model, episode)
    assert unreached(member, gradients) == []
    gradients = {n: g.clone() for n, g in gradients.items() if g is not None}
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    again, gradients_again = loss_and_gradients(model, episode)
    assert_close(again, loss, 1e-6)
    for name, gradient in gradients.items():
        assert_close(gradients_again[name], gradient, 1e-5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2).step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == gradients.keys()
    assert {n for n in before if ".iai." in n or "lora_" in n} == gradients_again.keys()


@EVERY
def test_half_precision(member, tmp_path):
    """State and head stay in float32; answers are those of float32, up to bfloat16's rounding."""
    member.base().save_pretrained(tmp_path)
    model = member.model(member.kind.auto.from_pretrained(tmp_path, dtype=torch.bfloat16).eval())
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if member.kind.refines:
        found = member.answer(model, member.stream(), member.queries())
    else:
        state = model.adapt(member.stream())
        assert {t.dtype for t in state.tensors.values() if t.is_floating_point()} <= {torch.float32, torch.float64}
        found = member.answer_under(model, state, member.queries())
    expected = usual_answer(member)
    assert found.isfinite().all()
    error = ((found - expected).square().mean().sqrt() / expected.std()).item()
    assert error < member.half


@EVERY
def test_autocast(member):
    """LoRA gets gradients, too."""
    model = member.model()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, member.episode(1))
    assert loss.isfinite() and unreached(member, gradients, zero=False) == []


# ---------------------------------------------------------------- bad input


@EVERY
def test_bad_chunks_are_named(member):
    model, queries, chunk = shared(member), member.queries(), member.stream()[0]

    def read(chunk: dict):
        return next(model.refine([chunk], queries)) if member.kind.refines else model.adapt([chunk])

    name = "input_ids" if "input_ids" in chunk else "inputs_embeds"
    flat = {n: t[0] if isinstance(t, Tensor) else t for n, t in chunk.items()}
    with pytest.raises(ValueError, match=re.escape(str(tuple(flat[name].shape)))):
        read(flat)
    if name == "input_ids":
        with pytest.raises(ValueError, match="token ids .*..100000 do not fit a vocabulary of"):
            read(chunk | {name: torch.full_like(chunk[name], 100_000)})
    else:
        with pytest.raises(ValueError, match=r"vectors \(\.\.\., 5\).* got shape \(1, 8, 3\)"):
            read(chunk | {name: chunk[name][..., :3]})
        with pytest.raises(ValueError, match="finite"):
            read(chunk | {name: chunk[name] * torch.nan})
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        read(chunk)


@every(READING)
def test_states_that_do_not_fit_are_refused(member):
    model, other, stream, queries = shared(member), untrained(member), member.stream(), member.queries()
    state, of_other = usual_state(member), other.initial_state()
    with pytest.raises(ValueError, match="adapt got no chunk: .*initial_state"):
        model.adapt([])
    with pytest.raises(ValueError, match="parallel must be at least 1, got 0"):
        model.adapt(stream, parallel=0)
    with pytest.raises(ValueError, match="state of 2 tasks cannot read a chunk of 1 rows"):
        model.adapt(stream, state=model.initial_state(2))
    for use in (lambda s: model.adapt(stream, state=s), lambda s: model(**queries, task_state=s)):
        with pytest.raises(ValueError, match="this state belongs to") as error:
            use(of_other)
        assert other.identity.name in str(error.value) and model.identity.name in str(error.value)
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        model(**queries, task_state=state)
    with pytest.raises(ValueError, match="refine needs regime='implicit'.*: use adapt"):
        model.refine(stream, queries)
    with pytest.raises(ValueError, match="different adapters"):
        TaskState.stack([state, of_other])


@every(REFINING)
def test_refined_predictions_have_no_task_state(member):
    model = shared(member)
    for call in (lambda: model.adapt(member.stream()), model.initial_state):
        with pytest.raises(ValueError, match="regime='implicit' does not have: the state belongs to the query.*refine"):
            call()
