"""The paper's tables: that their data and metrics are what they say, and that a table has all its rows."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from examples.paper import causal_order  # noqa: E402


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
    torch.testing.assert_close(x.mean(1), torch.zeros(30, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(1), torch.ones(30, 5), atol=1e-2, rtol=0)
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


def test_skewness_finds_the_order_of_skewed_linear_models():
    drawn = tasks(num=64, num_chunks=50, noise="Gumbel")
    *_, odds = causal_order.sort_by_skewness(drawn)
    assert causal_order.in_order(odds, drawn) > 70


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
    rows = causal_order.table("cpu", 1, Path(), num=2)
    methods = len(causal_order.BASELINES) + len(causal_order.REFINED)
    assert len(rows) == 2 * 2 * 2 * 2 * methods * 2
    assert all(0 <= row["value"] <= 100 for row in rows)
