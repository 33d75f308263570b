"""The signal `gradients`, the lora state, and the heads, each against a reference."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from kinds import TEXT
from members import READING, every
from peft import LoraConfig, get_peft_model
from tiny import REGIMES, chunks, gradient_model, ids, largest_difference, lora_state_model, make_base
from torch.nn.functional import cross_entropy, rms_norm

from hf_iai.objectives import Objective
from hf_iai.signals import read_gradients

STATES = ["prefix", "prompt", "lora"]
FEW_MODULES = {"state_target_modules": ["v_proj", "down_proj"]}  # for what takes long with a lora state of all
HEADS = ["learned_optimizer", "sgd", "meta_sgd", "path_aware"]
FAMILIES = ["llama", "qwen3", "gpt2"]
MEMBERS = [m for m in READING if m.kind is TEXT and m.values.get("signal") in ("gradients", "both")]
MEMBERS = [m for m in MEMBERS if m.family in FAMILIES and "second_order" not in m.values]


def inner_loss(model, tensors, text, labels=None):
    """As a user would write it, from logits."""
    base, core = model.reader.base, model.core
    with base.lora(model.active_peft_config.regime == "explicit"), core.state.under(base, tensors) as prefix:
        logits = base.answer(prefix, text, torch.ones_like(text)).logits
    labels = text if labels is None else labels
    rows = zip(logits, labels, strict=True)
    return [cross_entropy(row[:-1], row_labels[1:]) for row, row_labels in rows]


def theta_of(model, state):
    return {name: state.tensors[name].clone() for name in model.core.state.start}


def gradients(model, theta, text, mask=None, labels=None, second_order=False):
    mask = torch.ones_like(text) if mask is None else mask
    labels = text.masked_fill(mask == 0, -100) if labels is None else labels
    with model.reader.base.lora(model.active_peft_config.regime == "explicit"):
        return read_gradients(model.reader.base, model.core.state, theta, text, mask, labels, second_order=second_order)


# ---------------------------------------------------------------- the inner gradient


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("state_type", STATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_finite_differences(family, state_type, regime):
    model = gradient_model(family, state_type=state_type, regime=regime).double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:  # transformers' own computes in float32
            norm = lambda x, m=module: rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)  # noqa: E731
            module.forward = norm
    theta, text = theta_of(model, model.initial_state(2)), ids(2, 7)
    labels = text.clone()
    labels[0, 3] = -100
    found = gradients(model, theta, text, labels=labels)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in theta.items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        with torch.no_grad():
            plus, minus = (
                inner_loss(model, theta | {name: tensor + eps * direction}, text, labels) for eps in (1e-5, -1e-5)
            )
        for row in range(2):
            numeric = (plus[row] - minus[row]) / 2e-5
            exact = (found[name][row] * direction[row]).sum()
            assert (exact - numeric).abs() < 1e-6 * max(1, numeric.abs()), name


@pytest.mark.parametrize("state_type", STATES)
def test_rows_labels_and_padding_of_the_gradient(state_type):
    model = gradient_model(state_type=state_type)
    theta, text = theta_of(model, model.initial_state(3)), ids(3, 8)
    mask, labels = torch.ones_like(text), text.clone()
    labels[1] = -100  # nothing to learn from
    mask[2] = 0  # nothing to read
    found = gradients(model, theta, text, mask, labels)
    alone = gradients(model, {n: t[:1] for n, t in theta.items()}, text[:1])
    for name, tensor in found.items():
        assert (tensor[0] - alone[name][0]).abs().max() < 1e-6
        assert not tensor[1:].any() and torch.isfinite(tensor).all()
    for left in (0, 3):
        padded = torch.cat([ids(1, left, seed=2), text[:1], ids(1, 3 - left, seed=3)], 1)
        mask = torch.tensor([[0] * left + [1] * 8 + [0] * (3 - left)])
        same = gradients(model, {n: t[:1] for n, t in theta.items()}, padded, mask, padded)
        assert max((same[name] - alone[name]).abs().max() for name in same) < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("state_type", STATES)
def test_second_order_equals_torch_func(state_type, attention):
    """d/d theta(0) of the loss after a step of SGD, with every derivative by torch.func; first order differs."""
    values = {"state_type": state_type, "head": "sgd", "second_order": True, "initial_rate": 0.5}
    model = gradient_model(make_base("llama", attention), **values)
    text, query, core, base = ids(2, 7), ids(2, 6, seed=1), model.core, model.reader.base
    theta = {n: t.detach() for n, t in core.state.initial(2).items()}
    eager = gradient_model(make_base("llama", "eager"), **values)
    rates = {name: core.head.rate(name).detach() for name in theta}
    total = lambda theta, text: torch.stack(inner_loss(eager, theta, text)).sum()  # noqa: E731

    def after_step(theta):
        inner = torch.func.grad(total)(theta, text)
        return total({n: t - rates[n] * inner[n] for n, t in theta.items()}, query)

    expected = torch.func.grad(after_step)(theta)
    found = {}
    for second_order in (True, False):
        leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
        with base.lora(True):
            inner = read_gradients(
                base, core.state, leaves, text, torch.ones_like(text), text, second_order=second_order
            )
        stepped = {n: t - rates[n] * inner[n] for n, t in leaves.items()}
        loss = torch.stack(inner_loss(model, stepped, query)).sum()
        found[second_order] = torch.autograd.grad(loss, list(leaves.values()))
    for (name, reference), second in zip(expected.items(), found[True], strict=True):
        scale = max(1, reference.abs().max())
        assert (second - reference).abs().max() < 1e-5 * scale, name
    assert max((a - b).abs().max() for a, b in zip(found[True], found[False], strict=True)) > 1e-3


# ---------------------------------------------------------------- heads against hand-written loops


def run_by_hand(model, support, step):
    """theta after `step(theta, gradient, j)` for each chunk j."""
    theta = theta_of(model, model.initial_state(2))
    for j, chunk in enumerate(support):
        theta = step(theta, gradients(model, theta, chunk["input_ids"]), j)
    return theta


def check_by_hand(model, support, step, tolerance=1e-6):
    state = model.adapt(support)
    for name, tensor in run_by_hand(model, support, step).items():
        assert (state.tensors[name] - tensor).abs().max() <= tolerance, name
    assert largest_difference(state, model.initial_state(2)) > 1e-3


@pytest.mark.parametrize("state_type", STATES)
def test_sgd(state_type):
    model = gradient_model(state_type=state_type, head="sgd", initial_rate=0.2)
    rates = {n: 0.2 * (10 * p.detach()).exp() for n, p in model.core.head.log_rate.items()}
    assert len({rate.item() for rate in rates.values()}) == len(rates)
    check_by_hand(model, chunks(4), lambda theta, g, j: {n: t - rates[n] * g[n] for n, t in theta.items()})


@pytest.mark.parametrize("state_type", STATES)
def test_meta_sgd(state_type):
    model = gradient_model(state_type=state_type, head="meta_sgd", initial_rate=0.2)
    rates = {n: 0.2 * (10 * p.detach()).exp() for n, p in model.core.head.log_rate.items()}
    assert all(rates[n].shape == t.shape for n, t in model.core.state.start.items())
    check_by_hand(model, chunks(4), lambda theta, g, j: {n: t - rates[n] * g[n] for n, t in theta.items()})


@pytest.mark.parametrize("state_type", STATES)
def test_path_aware(state_type):
    model = gradient_model(state_type=state_type, head="path_aware", initial_rate=0.2, path_window=2)
    head = model.core.head
    rates = {n: 0.2 * (10 * p.detach()).exp() for n, p in head.log_rate.items()}
    path = [theta_of(model, model.initial_state(2))]

    def step(theta, gradient, j):
        theta = {n: t - rates[n] * gradient[n] for n, t in theta.items()}
        if (j + 1) % 2 == 0:
            shares = {n: p.detach().clamp(0, 1) for n, p in head.skip.items()}
            theta = {n: (1 - shares[n]) * t + shares[n] * path[-2][n] for n, t in theta.items()}
        path.append(theta)
        return theta

    assert max(p.max() for p in head.skip.values()) > 0.05
    check_by_hand(model, chunks(5), step)


@pytest.mark.parametrize("state_type", STATES)
def test_untrained_learned_optimizer_is_sgd(state_type):
    values = {"state_type": state_type, "trained": False, "initial_rate": 0.05}
    support = chunks(8)
    learned, sgd = (gradient_model(head=head, **values).adapt(support) for head in ("learned_optimizer", "sgd"))
    assert max((learned.tensors[n] - t).abs().max() for n, t in sgd.tensors.items()) < 1e-6
    # With a power of 1 it is a preconditioned one: every coordinate by the root of its second moment.
    model = gradient_model(head="learned_optimizer", learned_optimizer={"largest_surprise": 1e6}, **values)
    head = model.core.head
    with torch.no_grad():
        for power in head.power.values():
            power.fill_(0.1)
    second = {n: torch.zeros_like(t) for n, t in theta_of(model, model.initial_state(2)).items()}

    def step(theta, gradient, j):
        after = {}
        for n, t in theta.items():
            second[n] = 0.999 * second[n] + 0.001 * gradient[n] ** 2
            root = (second[n] / (1 - 0.999 ** (j + 1)) + 1e-20).sqrt()
            root = root / root.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (t.dim() - 1))
            after[n] = t - 0.05 * gradient[n] / root.clamp_min(1e-3)
        return after

    check_by_hand(model, chunks(4), step, tolerance=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_the_state_is_bounded(head):
    """A rate a thousand times too high: theta's rms stays below ten times that of its start."""
    for state_type in STATES:
        model = gradient_model(state_type=state_type, head=head, trained=False, initial_rate=1e6)
        state, start = model.adapt(chunks(3)), model.core.state.start
        for name in start:
            most = 10 * start[name].square().mean().sqrt().clamp_min(0.1)
            assert state.tensors[name].square().flatten(1).mean(1).sqrt().max() <= most * 1.0001
        assert all(torch.isfinite(t).all() for t in state.tensors.values())


# ---------------------------------------------------------------- training; first order, unrolled: test_contract.py


def few_modules(member) -> dict:
    return FEW_MODULES if member.values.get("state_type") == "lora" else {}


@every(MEMBERS)
def test_second_order_trains_everything(member):
    """Every parameter gets a gradient, and gradient checkpointing changes none; those at exact zeros are finite."""
    found = []
    for checkpointing in (False, True):
        model = member.model(second_order=True, **few_modules(member)).train()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(**member.episode()).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, grads), (loss_again, grads_again) = found
    assert [n for n, g in grads.items() if g is None or not g.any() or not g.isfinite().all()] == []
    assert (loss - loss_again).abs() < 1e-6
    for name, gradient in grads.items():
        assert (gradient - grads_again[name]).abs().max() < 1e-5 * max(1, gradient.abs().max()), name
    model = member.model(trained=False, second_order=True, **few_modules(member)).train()
    model(**member.episode()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@every(replace(m, slow=m.slow or m.values.get("state_type") != "prompt") for m in MEMBERS)
def test_no_objective_leaves_a_parameter_unused(member):
    """As data-parallel training asks, before anything is learned; under autocast LoRA still gets gradients."""
    for objective, autocast in (("truncated", False), ("greedy", False), ("greedy", True)):
        model = member.model(trained=False, **few_modules(member)).train()
        drawn = Objective(objective, window=2, draw=random.Random(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**member.episode(), objective=drawn).loss
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("state_type", STATES)
def test_gradients_alone_leave_the_parametric_reader_out(state_type):
    model = gradient_model(state_type=state_type, regime="parametric")
    assert not [n for n, _ in model.named_parameters() if "lora_" in n]


def test_labels_of_a_chunk():
    """Those given decide; all tokens by default; without any the state stays, but for what it has read."""
    model, text = gradient_model(head="learned_optimizer"), ids(1, 9)
    adapt = lambda **chunk: model.adapt([{"input_ids": text, **chunk}])  # noqa: E731
    default, given = adapt(), adapt(labels=text.clone())
    assert largest_difference(default, given) == 0
    some = text.clone()
    some[:, :5] = -100
    assert largest_difference(adapt(labels=some), default) > 1e-4
    none, start = adapt(labels=torch.full_like(text, -100)), model.initial_state()
    assert all(torch.equal(none.tensors[n], start.tensors[n]) for n in model.core.state.start)
    assert none.step.tolist() == [1] and none.num_tokens.tolist() == [9]
    with pytest.raises(ValueError, match=r"labels must have the shape of its ids \(1, 9\), got \(1, 8\)"):
        adapt(labels=text[:, 1:])


def test_both_starts_as_the_average():
    for state_type, delta_rule in [*product(STATES, [False]), ("prefix", True)]:
        states = {
            signal: lora_state_model(trained=False, state_type=state_type, signal=signal, delta_rule=delta_rule)
            for signal in ("both", "observations")
        }
        logits = [m(input_ids=ids(2, 6), task_state=m.adapt(chunks(3))).logits for m in states.values()]
        assert torch.equal(*logits)


# ---------------------------------------------------------------- the lora state


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_state_equals_a_lora_adapter(family, regime):
    """PEFT's own LoRA with the same A and B; explicit regime: on the base with the reader's LoRA merged."""
    model, query = gradient_model(family, state_type="lora", head="sgd", regime=regime), ids(3, 8, seed=1)
    state = model.adapt(chunks(2, batch=1))
    for name, tensor in state.tensors.items():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    expected = model(input_ids=query, task_state=state).logits
    update = model.core.state.update(state.tensors)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[path for path in update])
    predictor = make_base(family)
    if regime == "explicit":
        from peft.tuners.lora import LoraModel

        predictor = LoraModel.merge_and_unload(model.base_model)
    plain = get_peft_model(predictor, config).eval()
    with torch.no_grad():
        for path, (down, up) in update.items():
            layer = plain.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(down[0])
            layer.lora_B["default"].weight.copy_(up[0])
        logits = plain(input_ids=query).logits
    assert (logits - expected).abs().max() < (1e-6 if regime == "parametric" else 1e-5)


def test_lora_state_starts_without_effect():
    for signal in ("gradients", "observations", "both"):
        model = lora_state_model(trained=False, state_type="lora", signal=signal)
        query = ids(2, 6)
        assert torch.equal(
            model(input_ids=query, task_state=model.initial_state()).logits, model(input_ids=query).logits
        )


@pytest.mark.slow
def test_compiled_base():
    """Hooks come and go between the passes of one compiled base."""
    torch._dynamo.reset()
    model, query = gradient_model(state_type="lora"), ids(2, 6)
    with torch.no_grad():
        state = model.adapt(chunks(2))
        expected = [model(input_ids=query, task_state=s).logits for s in (None, state, None, state.select(0))]
        model.base_model.model.compile(backend="eager")
        found = [model(input_ids=query, task_state=s).logits for s in (None, state, None, state.select(0))]
        assert largest_difference(model.adapt(chunks(2)), state) < 1e-5
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-5
