"""`fit` finds the minimum that scikit-learn finds, and its gradients are those of the minimum."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_iai.heads.logistic import fit

CLASSES, WIDTH, NUM = 4, 6, 60


def problem(seed=0):
    """Points (1, N, d), one-hot classes, masses, and the second moment."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(1, NUM, WIDTH, generator=generator), dim=-1)
    labels = torch.randint(CLASSES, (1, NUM), generator=generator)
    mass = torch.rand(1, NUM, 1, generator=generator) + 0.5
    return points, torch.nn.functional.one_hot(labels, CLASSES).float(), mass, (points * mass).mT @ points


def fitted(penalty, prior=None, num_steps=100, rows=None):
    points, said, mass, moment = problem()
    prior = torch.zeros(1, NUM, CLASSES) if prior is None else prior
    rows = torch.zeros(1, CLASSES, WIDTH) if rows is None else rows
    return fit(rows, points, said, mass, prior, moment, penalty, num_steps)


@pytest.mark.parametrize("penalty", [0.03, 1.0, 30.0])
def test_the_minimum_is_that_of_scikit_learn(penalty):
    points, said, mass, _ = problem()
    reference = LogisticRegression(C=1 / penalty, fit_intercept=False, max_iter=5000, tol=1e-8)
    reference.fit(points[0].numpy(), said[0].argmax(-1).numpy(), mass.flatten().numpy())
    found = fitted(torch.tensor([penalty]))[0]
    torch.testing.assert_close(found, torch.tensor(reference.coef_, dtype=torch.float32), atol=2e-3, rtol=1e-2)


def test_steps_descend():
    points, said, mass, _ = problem()
    prior, penalty = torch.randn(1, NUM, CLASSES, generator=torch.Generator().manual_seed(3)) * 5, torch.tensor([0.1])

    def loss(rows):
        nats = -((prior + points @ rows.mT).log_softmax(-1) * said).sum(-1, keepdim=True)
        return ((nats * mass).sum() + 0.05 * rows.square().sum()).item()

    losses = [loss(fitted(penalty, prior, n)) for n in (0, 1, 2, 4, 8, 16)]
    assert all(after < before for before, after in zip(losses, losses[1:], strict=False))
    best = loss(fitted(penalty, prior, 200))
    assert losses[3] - best < 0.1 * (losses[0] - best)
    went_on = fitted(penalty, prior, 4, rows=fitted(penalty, prior, 4))
    assert loss(went_on) < losses[3]


def test_steps_descend_where_the_prior_is_sure_and_wrong():
    """There p (1 - p) is almost 0: Newton's method alone goes a thousand times too far."""
    points = torch.eye(2).repeat(10, 1)[None]  # (1, 20, 2)
    labels = torch.tensor([0, 1]).repeat(10)[None]
    labels[0, 0] = 1
    said, prior = torch.nn.functional.one_hot(labels, 2).float(), 15 * points
    rows, losses = torch.zeros(1, 2, 2), []
    for _ in range(8):
        nats = -((prior + points @ rows.mT).log_softmax(-1) * said).sum()
        losses.append((nats + 0.015 * rows.square().sum()).item())
        rows = fit(rows, points, said, torch.ones(1, 20, 1), prior, points.mT @ points, torch.tensor([0.03]), 4)
    assert all(after <= before * (1 + 1e-5) for before, after in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 5 < losses[0]
    assert ((prior + points @ rows.mT).argmax(-1)[0] == torch.tensor([0, 1]).repeat(10)).all()


def test_a_second_moment_that_rounding_made_indefinite():
    points, said, mass, moment = problem()
    points = points * torch.tensor([1.0, 1, 1, 0, 0, 0])
    moment = 1e5 * (points * mass).mT @ points - torch.diag(torch.tensor([0.0, 0, 0, 0.3, 0.3, 0.3]))
    prior = torch.zeros(1, NUM, CLASSES)
    found = fit(torch.zeros(1, CLASSES, WIDTH), points, said, mass, prior, moment, torch.tensor([1e-3]), 4)
    assert found.isfinite().all() and found.any()


def test_the_gradient_at_the_minimum_points_where_the_minimum_goes():
    prior = torch.randn(1, NUM, CLASSES, generator=torch.Generator().manual_seed(3))
    towards = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(4))
    for name in ("penalty", "prior"):
        scale = torch.tensor(1.0, requires_grad=True)
        of = {"penalty": torch.tensor([0.3]), "prior": prior}
        best = fitted(**of)
        (fitted(**of | {name: of[name] * scale}, num_steps=4, rows=best)[0] * towards).sum().backward()
        ends = [(fitted(**of | {name: of[name] * (1 + step)})[0] * towards).sum() for step in (-0.02, 0.02)]
        true = (ends[1] - ends[0]) / 0.04
        assert scale.grad * true > 0
        assert 0.3 < scale.grad / true < 1.7


def test_no_points_are_no_fit():
    none = torch.zeros(2, 0, CLASSES)
    rows = fit(
        torch.ones(2, CLASSES, WIDTH), torch.zeros(2, 0, WIDTH), none, torch.zeros(2, 0, 1), none,
        torch.zeros(2, WIDTH, WIDTH), torch.tensor([0.1, 1.0]), 3,
    )  # fmt: skip
    torch.testing.assert_close(rows, torch.zeros_like(rows), atol=1e-5, rtol=0)
