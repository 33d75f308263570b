"""Formulas of heads and signals that small changes of the code would break, each against a reference of its own.

Axes: B tasks, C classes, d width of features, L layers, H heads, P slots.
"""

import numpy as np
import pytest
import torch
from tiny import chunks, make_model
from torch import nn

import hf_iai.cores.both
from hf_iai.heads import ClassRows, GaussianRows, LearnedStep, LearnedStepSettings
from hf_iai.heads.average import RunningAverage
from hf_iai.heads.class_rows import MOST_LOGS
from hf_iai.heads.gaussian_rows import PENALTY, ROUNDING, same_outputs, with_outputs
from hf_iai.heads.gaussian_rows import _of_task as gaussian_inputs
from hf_iai.heads.guards import LESS, first_trust, trusted, updated_trust
from hf_iai.heads.normalized import NormalizedStep

WIDTH = 5


def disturbed(module: nn.Module, scale: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(scale * torch.randn_like(parameter))
    return module


def of_network(network: nn.Module, inputs: np.ndarray) -> np.ndarray:
    return network(torch.tensor(inputs, dtype=torch.float32)).detach().double().numpy()


class ClassRowsByHand:
    """The formulas of `ClassRows` in the words of its docstring, for one task, in float64."""

    def __init__(self, head: ClassRows, num_classes: int) -> None:
        self.head, self.count = head, np.zeros(num_classes)
        self.total, self.fitted = np.zeros((num_classes, WIDTH)), np.zeros((num_classes, WIDTH + 1))
        self.moment, self.guessed = np.zeros((WIDTH, WIDTH)), np.zeros(5)

    def task(self) -> np.ndarray:
        """Number of examples and classes, degrees of freedom, scatter within and between classes, rank, guesses."""
        n, classes = self.count.sum(), (self.count > 0).sum()
        of_means = sum(t @ t / c for t, c in zip(self.total, self.count, strict=True) if c > 0)
        within = np.trace(self.moment) - of_means
        between = of_means - self.total.sum(0) @ self.total.sum(0) / max(n, 1e-6)
        rank = np.trace(self.moment) ** 2 / max((self.moment**2).sum(), 1e-9)
        sizes = [np.log1p(n) - 4, np.log(max(classes, 1)) - 2, np.log1p(max(n - classes, 0)) - 3]
        parts = [2 * within / max(n, 1), 2 * between / max(n, 1), np.log(max(rank, 1)) - 3]
        known, right, p, low, _ = self.guessed
        guessed = np.array([2 * right - known, 2 * p - known, 2 * low]) / (known + 10)
        return np.array([*sizes, *parts, *guessed, 5 * self.wrong()])

    def wrong(self) -> float:
        """The estimated share of wrong labels."""
        known, _, _, low, expected = self.guessed
        return np.clip((low - expected) / (known - expected + 10), 0, 1)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        task, n, seen = self.task(), self.count.sum(), self.count > 0
        rho, _, *logs, _ = 3 * of_network(self.head.of_task, task)
        log_scale, _, log_sharpness = (most * np.tanh(log / most) for log, most in zip(logs, MOST_LOGS, strict=False))
        common = self.total.sum(0) / max(n, 1e-6)
        scatter = self.moment - sum(np.outer(t, t) / c for t, c in zip(self.total, self.count, strict=True) if c > 0)
        rows, bias = np.zeros_like(self.total), np.full(len(seen), -1e4)
        for c in range(len(seen)):
            share = np.clip(np.log(max(self.count[c], 1e-6) * max(seen.sum(), 1) / max(n, 1e-6)), -4, 4)
            mean = self.total[c] / max(self.count[c], 1e-6)
            inputs = [*task, np.log1p(self.count[c]) - 2, share, 2 * (mean - common) @ (mean - common) - 1]
            offset = 3 * of_network(self.head.of_class, inputs)[0]
            if not seen[c]:
                continue
            row = 15 * np.exp(log_scale) * np.linalg.solve(np.eye(WIDTH) + max(rho, 0) * scatter, mean)
            rows[c] = np.exp(log_sharpness) * (row + self.fitted[c, :-1])
            bias[c] = np.exp(log_sharpness) * (offset - row @ mean / 2 + self.fitted[c, -1])
        return rows, bias

    def fit(self) -> list[float]:
        """lambda, e and f."""
        _, doubt, _, log_penalty, _, log_distance = 3 * of_network(self.head.of_task, self.task())
        return [
            3.84 / WIDTH * np.exp(0.7 * np.tanh(log_penalty / 0.7)),
            min(10 * self.wrong(), 1) * 6 * np.tanh(max(doubt, 0) / 6),
            3 * np.exp(1.1 * np.tanh(log_distance / 1.1)),
        ]

    def read(self, features: np.ndarray, labels: np.ndarray, fitted: np.ndarray) -> None:
        """The sums by hand; the fitted rows are those of the head, which test_class_rows.py checks."""
        rows, bias = self.rows()
        logits, seen = features @ rows.T + bias, self.count > 0
        self.guessed *= 0.99 ** len(labels)
        for own, label in zip(logits, labels, strict=True):
            if seen[label] and np.delete(seen, label).any():
                p = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
                num = seen.sum()
                lower = [c for c in np.flatnonzero(seen) if (own[seen] > own[c]).sum() >= num - num // 2]
                r = (num // 2) / (num - 1)
                right = own[label] > np.delete(own, label).max()
                self.guessed += [1, right, p[label], (label in lower) / r, p[lower].sum() / r]
        said = np.eye(len(self.count))[labels]
        self.count, self.total = self.count + said.sum(0), self.total + said.T @ features
        self.moment = self.moment + features.T @ features
        self.fitted = fitted


@pytest.mark.parametrize("seed", range(3))
def test_class_rows_are_their_formulas(seed):
    """Two chunks of class numbers 0 to 2, then one in which class 3 is met, with padding in all of them; never 4."""
    torch.manual_seed(seed)
    head, draw = ClassRows().eval(), np.random.default_rng(seed)
    for network in (head.of_task, head.of_class):
        network[-1].weight.data.normal_(0, 0.3), network[-1].bias.data.uniform_(0, 0.3)
    by_hand, kept = ClassRowsByHand(head, 5), head.initial(1, 5, WIDTH)
    for met in (3, 3, 4):
        labels = draw.integers(met, size=9)
        features = draw.normal(size=(9, WIDTH)) + 0.5
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        padded = np.append(labels, -100)[None], np.append(features, np.full((1, WIDTH), np.nan), 0)[None]
        kept = {n: t.detach() for n, t in head(kept, torch.tensor(padded[1]), torch.tensor(padded[0])).items()}
        by_hand.read(features, labels, kept["fitted"][0].double().numpy())
        for name in ("count", "total", "moment", "guessed"):
            np.testing.assert_allclose(kept[name][0].numpy(), getattr(by_hand, name), rtol=2e-3, atol=2e-3)
        *_, penalty, _, doubts = head._discriminant(kept)
        np.testing.assert_allclose([penalty.item(), *doubts[0].tolist()], by_hand.fit(), rtol=2e-3, atol=1e-4)
        rows, bias = (t.detach()[0].numpy() for t in head.rows(kept))
        np.testing.assert_allclose(rows, by_hand.rows()[0], rtol=2e-3, atol=1e-2)
        np.testing.assert_allclose(bias, by_hand.rows()[1], rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("num", [1, 4, 40])
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_inputs_of_a_learned_penalty_are_their_formulas(num, outputs):
    """Against fits to the examples themselves: explained variance, and generalised cross-validation."""
    draw = np.random.default_rng(num)
    x = draw.normal(size=(num, WIDTH)) * np.arange(1, WIDTH + 1) + 1
    y = x @ draw.normal(size=(WIDTH, outputs)) + draw.normal(size=(num, outputs))
    head = GaussianRows()
    kept = head(head.initial(1, outputs, WIDTH), *(torch.tensor(t[None]) for t in (x, y)), torch.ones(1, num))
    centred, target = x - x.mean(0), y - y.mean(0)
    values = np.linalg.eigvalsh(centred.T @ centred).clip(0)
    rank = values.sum() ** 2 / max((values**2).sum(), 1e-300)
    expected = [np.log1p(num) - 4, np.log(WIDTH) - 4, np.log1p(num) - np.log(WIDTH), np.log(max(rank, 1)) - 3]
    for relative in (PENALTY, 0.1, 10.0):
        added = relative * values.sum() / WIDTH + ROUNDING * (x**2).sum() + np.finfo(float).tiny ** 0.5
        fit = np.linalg.solve(centred.T @ centred + added * np.eye(WIDTH), centred.T @ target)
        varies = (target**2).sum(0) > ROUNDING * (y**2).sum(0)
        share = np.ones(outputs)
        share[varies] = (((target - centred @ fit) ** 2).sum(0)[varies] / (target**2).sum(0)[varies]).clip(0, 1)
        free = max(1 - (1 + (values / (values + added)).sum()) / num, 0.05)
        left = np.log(np.maximum(share / free**2, 1e-3))
        expected += [(1 - share).mean(), left.mean()]
    np.testing.assert_allclose(gaussian_inputs(kept)[0].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_outputs_of_states_that_have_read_nothing():
    """They are those of the states that have read something; other numbers do not go together."""
    head = GaussianRows()
    nothing = head.initial(1, 0, WIDTH)
    read = head(head.initial(1, 2, WIDTH), torch.randn(1, 3, WIDTH), torch.randn(1, 3, 2), torch.ones(1, 3))
    for kept in same_outputs([nothing, read]):
        assert [tuple(kept[name].shape) for name in ("target", "square", "cross")] == [(1, 2), (1, 2), (1, 2, WIDTH)]
    assert all(torch.equal(t, read[name]) for name, t in same_outputs([nothing, read])[1].items())
    with pytest.raises(ValueError, match="states of 2 and 3 outputs do not go together"):
        with_outputs(read, 3)


def test_a_learned_penalty_is_its_formula():
    torch.manual_seed(0)
    head = disturbed(GaussianRows())
    x = torch.randn(2, 8, WIDTH)
    kept = head(head.initial(2, 1, WIDTH), x, x[..., :1], torch.ones(2, 8))
    found, log = head.penalty(kept), 10 * torch.tanh(0.3 * head.of_task(gaussian_inputs(kept)))[:, 0]
    spread = (x - x.mean(1, keepdim=True)).double().square().sum((1, 2))
    expected = PENALTY * log.double().exp() * spread / WIDTH + ROUNDING * x.double().square().sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert (log.abs() > 0.1).all()


def test_a_regression_of_nothing_and_of_constant_features_is_finite():
    head = GaussianRows()
    nothing = head.initial(1, 2, WIDTH)
    constant = head(nothing, torch.zeros(1, 3, WIDTH), torch.arange(6.0).view(1, 3, 2), torch.ones(1, 3))
    for kept, bias in ((nothing, [0.0, 0.0]), (constant, [2.0, 3.0])):
        assert head.penalty(kept).item() > 0
        rows, found = head.rows(kept)
        assert not rows.any() and found[0].tolist() == bias


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


@pytest.mark.parametrize("slope", [-2.0, 2.0])
def test_a_slope_that_is_only_as_large_as_its_error_is_not_certain(slope):
    kept = {"slope": torch.tensor([0.0]), "slope_square": torch.tensor([0.0]), "trust": torch.tensor([0.5])}
    after, factor = updated_trust(kept, torch.tensor([slope]), doubt=1.0)
    assert after["trust"].item() == 0.5 and factor.item() == 1.0


def test_trust_grows_back_to_one_at_most():
    kept = {"slope": torch.tensor([-9.0]), "slope_square": torch.tensor([1.0]), "trust": torch.tensor([0.9])}
    assert updated_trust(kept, torch.tensor([-3.0]), doubt=1.0)[0]["trust"].item() == 1.0


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


class LearnedStepByHand:
    """The formulas of `LearnedStep` for the matrices of one task, in float64; no step is surprising or doubted."""

    def __init__(self, head: LearnedStep, shape: tuple[int, int, int]) -> None:  # L matrices (O, I)
        self.head, self.momentum, self.second = head, np.zeros((3, *shape)), np.zeros((2, *shape))
        self.row, self.column, self.count = np.zeros(shape[:2]), np.zeros((shape[0], shape[2])), 0

    def features(self, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Each over its root mean square over all matrices: (L, O, I, F)."""
        momenta = [m / (1 - d**self.count) for m, d in zip(self.momentum, (0.5, 0.9, 0.99), strict=True)]
        seconds = [s / (1 - d**self.count) for s, d in zip(self.second, (0.9, 0.999), strict=True)]
        row, column = (t / (1 - 0.999**self.count) for t in (self.row[..., None], self.column[:, None]))
        factored = row * column / row.mean(1, keepdims=True)
        found = [gradient, theta, *momenta, *(np.sqrt(s) for s in seconds)]
        found += [gradient / np.sqrt(s) for s in seconds] + [m / np.sqrt(seconds[1]) for m in momenta]
        found += [np.sqrt(t) * np.ones_like(theta) for t in (row, column)]
        found += [t / np.sqrt(factored) for t in (gradient, *momenta)] + [seconds[1] ** -0.5, factored**-0.5]
        return np.stack([t / root_mean_square(t) for t in found], -1)

    def step(self, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        for averages, decays, new in (
            (self.momentum, (0.5, 0.9, 0.99), gradient),
            (self.second, (0.9, 0.999), gradient**2),
        ):
            for average, decay in zip(averages, decays, strict=True):
                average[:] = decay * average + (1 - decay) * new
        self.row = 0.999 * self.row + 0.001 * (gradient**2).mean(2)
        self.column = 0.999 * self.column + 0.001 * (gradient**2).mean(1)
        times = np.tanh(self.count / np.array(self.head.settings.times) - 1)
        self.count += 1
        learned = {name: values["a"].item() for name, values in self.learned().items()}
        root = np.sqrt(self.second[1] / (1 - 0.999**self.count))
        precondition = np.maximum(root / root_mean_square(root), 1e-3) ** (-10 * learned["power"])
        stepped = theta - 0.1 * np.exp(10 * learned["log_rate"]) * precondition * gradient
        hidden = of_network(self.head.read, self.features(theta, gradient)) + of_network(self.head.read_times, times)
        hidden = of_network(self.head.middle, hidden.clip(0)).clip(0)
        direction, size = np.moveaxis(of_network(self.head.write, hidden), -1, 0)
        u = direction * np.exp(3 * np.tanh(size / 3))
        length = 0.01 * np.exp(10 * learned["log_step"]) * max(root_mean_square(theta), 0.1)
        return stepped - length * u / max(root_mean_square(u), 1)

    def learned(self) -> dict[str, nn.ParameterDict]:
        return {name: getattr(self.head, name) for name in ("log_rate", "log_step", "power")}


@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_a_learned_step_is_its_formulas(scale):
    """Two tasks in one batch, four steps; the network's outputs are small, and large enough to be normed."""
    head = disturbed(LearnedStep({"w": "a"}, 0.1, LearnedStepSettings(largest_surprise=1e6, doubt=1e6)))
    head.write.weight.data.mul_(scale)
    for values in (head.log_rate, head.log_step, head.power):
        values["a"].data.uniform_(0.02, 0.1)
    draw = np.random.default_rng(0)
    theta, kept = draw.normal(size=(2, 2, 3, 4)), head.initial({"w": torch.zeros(2, 2, 3, 4)})
    start, by_hand = {"w": torch.zeros(2, 3, 4)}, [LearnedStepByHand(head, (2, 3, 4)) for _ in theta]
    for count in range(4):
        gradient = draw.normal(size=(2, 2, 3, 4))
        found, kept = head(
            {"w": torch.tensor(theta).float()},
            kept,
            {"w": torch.tensor(gradient).float()},
            torch.tensor([count, count]),
            start,
        )
        theta = np.stack([task.step(t, g) for task, t, g in zip(by_hand, theta, gradient, strict=True)])
        np.testing.assert_allclose(found["w"].detach().numpy(), theta, rtol=1e-3, atol=1e-4)


def test_a_learned_step_without_a_kind_takes_the_mean_over_kinds():
    head = LearnedStep({"v": "a", "w": "b"}, 0.1, LearnedStepSettings())
    head.log_rate["a"].data.fill_(0.1), head.log_rate["b"].data.fill_(0.3)
    averages = {name.removesuffix("_w"): t for name, t in head.initial({"w": torch.zeros(1, 2, 3)}).items()}
    averages = {name: averages[name] for name in ("momentum", "second", "row", "column")}
    moved = [head.stepped(kind, torch.zeros(1, 2, 3), averages, torch.ones(1, 2, 3), torch.zeros(1)) for kind in "ab"]
    both = head.stepped(None, torch.zeros(1, 2, 3), averages, torch.ones(1, 2, 3), torch.zeros(1))
    torch.testing.assert_close(both, -(moved[0] * moved[1]).sqrt())  # rates are learned as logarithms


def test_a_normalized_step_is_its_formula():
    """Two tasks, three steps; the factored second moment is a running mean whose decay grows with the step."""
    head = disturbed(NormalizedStep({"w": torch.zeros(3, 4)}, 0.02), 0.01)
    draw, theta = np.random.default_rng(0), {"w": torch.zeros(2, 3, 4)}
    kept, row, column, expected = head.initial(theta), 0.0, 0.0, np.zeros((2, 3, 4))
    assert kept["row_w"].shape == (2, 3) and kept["column_w"].shape == (2, 4)
    for count in range(3):
        gradient = draw.normal(size=(2, 3, 4)) * np.array([1.0, 1e3])[:, None, None]
        share = (count + 1) ** -0.8
        row = (1 - share) * row + share * (gradient**2).mean(2)
        column = (1 - share) * column + share * (gradient**2).mean(1)
        u = gradient / np.sqrt(row[..., None] * column[:, None] / row.mean(1)[:, None, None])
        u /= np.maximum(np.sqrt((u**2).mean((1, 2), keepdims=True)), 1)
        expected = expected - head.rate("w").item() * u
        kept = kept | first_trust(theta["w"])  # without doubt
        theta, kept = head(
            theta, kept, {"w": torch.tensor(gradient).float()}, torch.tensor([count, count]), {"w": torch.zeros(3, 4)}
        )
        np.testing.assert_allclose(theta["w"].detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_trusted_step_is_taken_bitwise():
    theta, after, start = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(trusted(theta, after, start, torch.ones(2), torch.ones(2)), after)


def test_a_doubted_step_is_taken_in_part():
    theta, after, start = torch.full((3, 2, 2), 3.0), torch.full((3, 2, 2), 5.0), torch.ones(2, 2)
    found = trusted(theta, after, start, torch.tensor([1.0, 0.8, 0.8]), torch.tensor([1.0, 0.5, 1.0]))
    # start + less * way + trust * step
    assert found[:, 0, 0].tolist() == pytest.approx([5.0, 1 + 0.8 * 2 + 0.5 * 2, 1 + 0.8 * 2 + 2.0])


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


def test_both_learns_from_labels_alone():
    """Tokens whose label is -100 are read, but give no gradient."""
    model, text = make_model(signal="both"), chunks(1)[0]["input_ids"]
    unlabelled = model.adapt([{"input_ids": text, "labels": torch.full_like(text, -100)}])
    default = model.adapt([{"input_ids": text}])
    for name in ("key", "value"):
        assert not unlabelled.tensors[f"gradient_{name}"].any() and default.tensors[f"gradient_{name}"].any()


def test_precision_and_rate_are_their_formulas():
    """Learned weights of published adapters count in these units."""
    head = disturbed(RunningAverage(num_layers=2, num_heads=3, num_slots=2, width=4), 1.0)
    hidden, mass = torch.randn(1, 2, 4), torch.rand(1, 2, 3, 2)
    normed = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    score = torch.einsum("bpw,lhw->blhp", normed, head.weight.view(2, 3, 4)) + 10 * head.mass_exponent * mass.log()
    torch.testing.assert_close(head.precision(hidden, mass), (6 * torch.tanh(score / 6)).exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.rate(), (0.03 * head.forgetting).clamp_min(0))


def test_little_mass_counts_as_a_least_mass_and_none_as_nothing():
    head = disturbed(RunningAverage(num_layers=1, num_heads=2, num_slots=3, width=4))
    head.mass_exponent.data.fill_(0.02)
    hidden = torch.randn(1, 3, 4)
    mass = torch.tensor([0.0, 1e-6, 1e-4, 1.0]).view(4, 1, 1, 1).expand(4, 1, 2, 3)
    found = head.precision(hidden.expand(4, -1, -1), mass)
    assert not found[0].any() and torch.equal(found[1], found[2]) and not torch.allclose(found[2], found[3])
