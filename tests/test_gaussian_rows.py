"""`GaussianRows`: at the start it is ridge regression, and what it learns keeps to the rules of a state."""

import pytest
import torch
from tiny import disturb

from hf_iai.heads import GaussianRows

WIDTH = 12


def stream(num=60, tasks=2, noise=0.3, seed=0):
    """Features (B, n, d) and targets (B, n, 2) of another plane for each task."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, num, WIDTH, generator=generator)
    y = x @ torch.randn(tasks, WIDTH, 2, generator=generator) + 1
    return x, y + noise * torch.randn(y.shape, generator=generator)


def read(head, x, y, kept=None):
    return head(kept or head.initial(len(x), y.shape[-1], WIDTH), x, y, torch.ones(x.shape[:2]))


def disturbed() -> GaussianRows:
    torch.manual_seed(1)
    head = GaussianRows()
    disturb(head, scale=0.2)
    return head


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("num", "mean"), [(1, 0), (6, 3), (60, 3)])
def test_starts_as_ridge_regression(num, mean, fit_intercept):
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), head = stream(num), GaussianRows(fit_intercept=fit_intercept)
    rows, bias = head.rows(read(head, x + mean, y))
    for task, features in enumerate((x + mean).double().numpy()):
        centre = fit_intercept * features.mean(0)
        alpha = 1e-3 * ((features - centre) ** 2).sum() / WIDTH + 1e-10 * (features**2).sum()
        found = linear_model.Ridge(alpha=alpha, fit_intercept=fit_intercept).fit(features, y[task].double().numpy())
        torch.testing.assert_close(rows[task].double(), torch.tensor(found.coef_), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            bias[task].double(), torch.as_tensor(found.intercept_, dtype=torch.float64).expand(2), atol=1e-4, rtol=1e-4
        )


def test_the_penalty_is_learned_from_what_does_not_depend_on_units():
    (x, y), head = stream(), disturbed()
    kept = read(head, x, y)
    assert ((head.penalty(kept) / GaussianRows().penalty(kept)).log().abs() > 0.1).all()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)))[0]
    (rows, bias), turned = head.rows(kept), head.rows(read(head, 40 * x @ turn, 7 * y))
    torch.testing.assert_close(turned[0] * 40 / 7, rows @ turn, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[1] / 7, bias, atol=1e-4, rtol=1e-4)


def test_neither_order_nor_batch_nor_padding_matters():
    (x, y), head = stream(), disturbed()
    rows, bias = head.rows(kept := read(head, x, y))
    order = torch.randperm(60)
    back = read(head, x[:, order[20:]], y[:, order[20:]], read(head, x[:, order[:20]], y[:, order[:20]]))
    torch.testing.assert_close(head.rows(back), (rows, bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.rows(read(head, x[1:], y[1:])), (rows[1:], bias[1:]), atol=1e-6, rtol=1e-6)
    nothing = head(kept, x * torch.nan, y * torch.nan, torch.zeros(2, 60))
    assert all(torch.equal(kept[name], nothing[name]) for name in kept)


def test_features_that_do_not_vary_give_no_rows():
    (x, y), head = stream(5), disturbed()
    for same in (torch.zeros_like(x), torch.ones_like(x), x[:, :1].expand_as(x)):
        rows, bias = head.rows(read(head, same, y))
        assert rows.abs().max() < 1e-4
        torch.testing.assert_close(bias, y.mean(1), atol=1e-3, rtol=0)
    assert not any(t.any() for t in head.rows(head.initial(2, 1, WIDTH)))


def test_it_learns_to_penalise_noise():
    torch.manual_seed(0)
    head, plain = GaussianRows(), GaussianRows()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)

    def loss(head, seed, noise):
        x, y = stream(40, tasks=16, noise=noise, seed=seed)
        rows, bias = head.rows(read(head, x[:, :20], y[:, :20]))
        return (x[:, 20:] @ rows.mT + bias.unsqueeze(1) - y[:, 20:]).square().mean()

    for step in range(60):
        optimizer.zero_grad()
        (loss(head, step, 4.0) / 30 + loss(head, step, 0.1)).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(head, 1000, 4.0) < 0.8 * loss(plain, 1000, 4.0)
        assert loss(head, 1000, 0.1) < 1.2 * loss(plain, 1000, 0.1)
