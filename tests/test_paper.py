"""The paper's tables: that their data and metrics are what they say, and that a table has all its rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from examples.paper import causal_order, generation, in_context, linear_regression, run
from hf_iai.evaluation.classifiers import sgd_rows


def tasks(num=4, num_chunks=3, n=5, graph="ER", mechanism="linear", noise="Laplace"):
    return causal_order.draw_tasks(np.random.default_rng(0), num, num_chunks, n, graph, mechanism, noise)


@pytest.mark.parametrize("graph", causal_order.GRAPHS)
def test_graphs_have_no_cycle_and_all_their_paths(graph):
    drawn = tasks(num=20, n=7, graph=graph)
    for edges, before in zip(drawn.edges.double(), drawn.before, strict=True):
        paths = sum(torch.linalg.matrix_power(edges, length) for length in range(1, 8)) > 0
        assert torch.equal(paths, before)
        assert not before.diagonal().any()


@pytest.mark.parametrize("mechanism", causal_order.MECHANISMS)
def test_samples_depend_on_parents_alone(mechanism):
    """A variable without parents is independent of those that it does not lead to: correlations there are noise."""
    drawn = tasks(num=30, num_chunks=60, mechanism=mechanism)
    x = drawn.samples.flatten(1, 2)
    assert x.mean(1).abs().max() < 0.2
    assert (x.std(1) - 1).abs().max() < 0.2
    correlation = x.mT @ x / x.shape[1]
    related = drawn.before | drawn.before.mT | ((drawn.before.mT.float() @ drawn.before.float()) > 0)
    apart = ~related & ~torch.eye(5, dtype=torch.bool)
    assert correlation[apart].abs().mean() < 0.03
    assert correlation[drawn.edges].abs().mean() > 0.2


def test_the_true_order_has_all_edges_and_its_reverse_none():
    drawn = tasks()
    odds = drawn.before.float() - drawn.before.mT.float()
    assert causal_order.in_order(odds, drawn) == 100
    assert causal_order.in_order(-odds, drawn) == 0
    assert causal_order.in_order(0 * odds, drawn) == 50


@pytest.mark.parametrize(("score", "noise"), [(causal_order.by_skewness, "Gumbel"), (causal_order.by_tails, "Laplace")])
def test_pairs_find_the_order_of_linear_models(score, noise):
    drawn = tasks(num=64, num_chunks=50, noise=noise)
    *_, odds = causal_order.without_learning(score, drawn)
    assert causal_order.in_order(odds, drawn) > 75


def test_the_fit_is_that_of_least_squares():
    x = tasks(num=1, num_chunks=50).samples.flatten(1, 2)
    x = (x - x.mean(1, keepdim=True)).double()
    _, r2 = causal_order.regressed(x.mT @ x / x.shape[1])
    for j in range(5):
        others = x[0][:, [i for i in range(5) if i != j]]
        rest = x[0, :, j] - others @ torch.linalg.lstsq(others, x[0, :, j]).solution
        assert r2[0, j].item() == pytest.approx(1 - (rest.var() / x[0, :, j].var()).item(), abs=0.03)


@pytest.mark.parametrize("name", causal_order.REFINED)
def test_renaming_variables_renames_the_answer(name):
    torch.manual_seed(0)
    model, drawn, order = causal_order.REFINED[name](), tasks(), torch.randperm(5)
    torch.nn.init.normal_(model.decoder.last.weight)
    renamed = drawn._replace(samples=drawn.samples[..., order])
    with torch.no_grad():
        for odds, again in zip(model(drawn), model(renamed), strict=True):
            torch.testing.assert_close(again, odds[:, order][:, :, order], atol=1e-4, rtol=1e-4)


def test_the_table_has_every_method_after_every_count(monkeypatch):
    monkeypatch.setattr(causal_order, "STEPS", {"cpu": 2})
    monkeypatch.setattr(causal_order, "COUNTS", (1, 3))
    rows = causal_order.table("cpu", 1, Path(), Path(), num=2)
    methods = len(causal_order.BASELINES) + len(causal_order.REFINED)
    assert len(rows) == 2 * 2 * 2 * 2 * methods * 2
    assert all(0 <= row["value"] <= 100 for row in rows)


def test_letters_have_their_holes():
    rng = np.random.default_rng(0)
    points = np.abs(generation.draw_letter(rng, 4000, "O"))
    assert (np.hypot(*points.T) < 0.4).mean() < 0.01  # nothing in the middle
    assert points.max() > 1


def test_energy_distance_is_zero_of_one_distribution():
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(50, 200, 2))) for _ in range(2))
    assert generation.energy_distance(x, y).mean().abs() < 0.01
    # In one dimension it is twice the squared distance of the distribution functions: 2 |a| for points at 0 and a.
    zero, one = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 0.0]]]).expand(1, 3, 2)
    assert generation.energy_distance(zero, one).item() == pytest.approx(2)


def test_densities_of_mixtures():
    torch.manual_seed(0)
    theta, x = torch.randn(1, 3, 4), torch.randn(1, 5, 2)
    normals = torch.distributions.Normal(theta[0, :, None, :2], theta[0, :, None, 2:3].clamp_min(np.log(0.05)).exp())
    each = normals.log_prob(x).sum(-1).T + theta[0, :, 3].log_softmax(0)
    torch.testing.assert_close(generation.log_likelihood(theta, x)[0], each.logsumexp(1))


def test_sums_do_not_depend_on_the_cut_where_components_do_not_move():
    """With masses far above the data responsibilities stay: the sums of two chunks are those of one."""
    torch.manual_seed(0)
    model, x = generation.Sums(), torch.randn(2, 1, 64, 2)
    torch.nn.init.constant_(model.start.data[..., 3], 12.0)
    *_, once = model.states(x)
    *_, twice = model.states(x.view(2, 2, 32, 2))
    torch.testing.assert_close(once, twice, atol=1e-3, rtol=1e-3)


def test_generation_has_its_table_and_its_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "STEPS", {"cpu": 1})
    monkeypatch.setattr(generation, "COUNTS", (1, 10, 50))
    monkeypatch.setattr(generation, "SAMPLES", 64)
    rows = generation.table("cpu", 1, Path(), tmp_path, num=4)
    assert len(rows) == 2 * 3 * (len(generation.BASELINES) + len(generation.REFINED))
    assert all(np.isfinite(row["value"]) for row in rows)
    assert (tmp_path / "generation_samples.png").stat().st_size > 1000


def test_tasks_and_models_are_made_where_torch_makes_tensors():
    """That is the accelerator in tier `gpu`; the device that holds no values shows what would stay behind."""
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        drawn = [
            *linear_regression.draw_tasks(rng, 2, 3, 2)[:3],
            *in_context.draw_tasks(rng, 2, 3, 2),
            generation.draw_tasks(rng, 2, 3, generation.KINDS[0], "train"),
            causal_order.draw_tasks(rng, 2, 3, 5, "ER", "linear", "Laplace").samples,
        ]
        modules = [in_context.small_base(), in_context.NeuralProcess(2)]
        modules += [linear_regression.refined(name, 2)[0] for name in linear_regression.REFINED]
        modules += [make() for make in (generation.REFINED | causal_order.REFINED).values()]
        # Baselines compute on the CPU, whatever the default is.
        x, y = rng.normal(size=(4, 3)).astype(np.float32), np.array([0, 1, 0, 1])
        assert set(sgd_rows(x, y, x)) <= {0, 1}
    tensors = [*drawn, *(parameter for module in modules for parameter in module.parameters())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_tier_gpu_needs_an_accelerator(tmp_path):
    with pytest.raises(typer.BadParameter, match="--tier gpu needs an accelerator with float64, got None"):
        run.main("linear_regression", tier="gpu", output=tmp_path)
    assert not any(tmp_path.iterdir())
