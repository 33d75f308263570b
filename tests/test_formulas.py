"""Formulas of heads and signals that small changes of the code would break, each against a reference of its own.

Axes: B tasks, C classes, d width of features, L layers, H heads, P slots.
"""

import pytest
import torch
from tiny import chunks, make_model
from torch import nn

import hf_iai.cores.both
from hf_iai.heads import ClassRows, GaussianRows, LearnedStep, LearnedStepSettings
from hf_iai.heads.average import RunningAverage
from hf_iai.heads.gaussian_rows import PENALTY, ROUNDING
from hf_iai.heads.guards import LESS, updated_trust

WIDTH = 5


def disturbed(module: nn.Module, scale: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(scale * torch.randn_like(parameter))
    return module


def sums_of_classes(head: ClassRows, num_classes: int = 3, unseen: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    features = nn.functional.normalize(torch.randn(1, 12, WIDTH) + 1, dim=-1)
    kept = head.initial(1, num_classes + unseen, WIDTH)
    return head(kept, features, torch.arange(12)[None] % num_classes)


def test_the_correction_of_a_row_turns_around_the_common_mean():
    """logits = W x + b with correction c is that without, plus c (x - g): nothing changes at x = g."""
    head = disturbed(ClassRows())
    kept = {name: t.detach() for name, t in sums_of_classes(head, unseen=0).items()}
    correction = torch.randn(1, 3, WIDTH)
    with_it = kept | {"correction": correction * kept["count"].unsqueeze(-1)}
    without = kept | {"correction": torch.zeros_like(correction)}
    common = kept["total"].sum(1) / kept["count"].sum(1, keepdim=True)  # (1, d)
    for x in (common, torch.randn(1, WIDTH)):
        found = [(rows @ x.mT).squeeze(-1) + bias for rows, bias in (head.rows(with_it), head.rows(without))]
        expected = (correction @ (x - common).mT).squeeze(-1)
        assert torch.allclose(found[0] - found[1], expected, atol=1e-4)


def test_a_margin_counts_where_both_classes_were_read():
    head = disturbed(ClassRows())
    kept = sums_of_classes(head)  # classes 0 to 2 were read, class 3 was not
    x = torch.randn(1, 2, WIDTH)
    y = nn.functional.one_hot(
        torch.tensor([[0, 3]]), 4
    ).float()  # an example of a class that was read, and of the other
    margin = head._judge(kept, x, y)[0][..., 3]  # (1, n, C)
    assert (margin[0, 0, :3] != 0).all() and margin[0, 0, 3] == 0
    assert not margin[0, 1].any()
    rows, bias = head.rows(kept)
    logits = (x @ rows.mT + bias.unsqueeze(1))[0, 0]
    assert margin[0, 0, 1].item() == pytest.approx(((logits[1] - logits[0]).clamp(-20, 20) / 10).item(), rel=1e-4)
    assert margin[0, 0, 0].item() == pytest.approx(
        ((logits[0] - logits[1:3].max()).clamp(-20, 20) / 10).item(), rel=1e-4
    )


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_penalty_of_a_regression_is_above_rounding(offset):
    """lambda = PENALTY trace(S) / d + ROUNDING trace(sum x x'): features far from 0 round more than they spread."""
    head = GaussianRows()
    x = torch.randn(1, 8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset
    kept = head(head.initial(1, 1, WIDTH), x, torch.ones(1, 8, 1), torch.ones(1, 8))
    spread = (x - x.mean(1, keepdim=True)).square().sum().item()
    expected = PENALTY * spread / WIDTH + ROUNDING * x.square().sum().item()
    assert head.penalty(kept).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("slope", "trust", "less"),
    [(3.0, 0.5 * LESS, LESS), (0.1, 0.5, 1.0), (0.0, 0.5, 1.0), (-0.1, 0.5, 1.0), (-3.0, 0.5 / LESS, 1.0)],
)
def test_trust_changes_only_where_the_slope_is_certain(slope, trust, less):
    kept = {"slope": torch.tensor([0.0]), "slope_square": torch.tensor([1.0]), "trust": torch.tensor([0.5])}
    after, factor = updated_trust(kept, torch.tensor([slope]), doubt=0.9)
    assert after["trust"].item() == pytest.approx(trust) and factor.item() == pytest.approx(less)
    assert after["slope"].item() == pytest.approx(slope)
    assert after["slope_square"].item() == pytest.approx(0.9 + slope**2 if slope else 1.0)


def test_trust_grows_back_to_one_at_most():
    kept = {"slope": torch.tensor([-9.0]), "slope_square": torch.tensor([1.0]), "trust": torch.tensor([0.9])}
    assert updated_trust(kept, torch.tensor([-3.0]), doubt=1.0)[0]["trust"].item() == 1.0


def test_a_task_without_a_gradient_stays_where_it_is():
    net = disturbed(LearnedStep({"": "a"}, 1.0, LearnedStepSettings()))
    theta, gradient = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gradient[0] = 0
    averages = {name.removesuffix("_"): t for name, t in net.initial({"": theta}).items()}
    averages = net.accumulated({k: averages[k] for k in ("momentum", "second", "row", "column")}, gradient)
    after = net.stepped("a", theta, averages, gradient, torch.zeros(2, dtype=torch.long))
    assert torch.equal(after[0], theta[0]) and not torch.equal(after[1], theta[1])


def test_both_keeps_the_mean_gradient(monkeypatch):
    model, values = make_model(signal="both"), iter((1.0, 2.0, 6.0))

    def constant(base, state, tensors, *chunk, second_order):
        value = next(values)
        return {name: torch.full_like(t, value) for name, t in tensors.items() if name in state.start}

    monkeypatch.setattr(hf_iai.cores.both, "read_gradients", constant)
    state = model.adapt(chunks(3))
    for name in ("key", "value"):
        assert torch.allclose(state.tensors[f"gradient_{name}"], torch.tensor(3.0))


def test_little_mass_counts_as_a_least_mass_and_none_as_nothing():
    head = disturbed(RunningAverage(num_layers=1, num_heads=2, num_slots=3, width=4))
    head.mass_exponent.data.fill_(0.02)
    hidden = torch.randn(1, 3, 4)
    mass = torch.tensor([0.0, 1e-6, 1e-4, 1.0]).view(4, 1, 1, 1).expand(4, 1, 2, 3)
    found = head.precision(hidden.expand(4, -1, -1), mass)
    assert not found[0].any() and torch.equal(found[1], found[2]) and not torch.allclose(found[2], found[3])
