"""Prototypes stand for the examples of a class, whatever their number."""

import numpy as np
import pytest
import torch

from hf_iai.heads.prototypes import absorb, unite

CLASSES, PLACES, WIDTH = 3, 4, 5


def read(x, labels):
    """Points and masses of one task, chunks of 6 examples."""
    points, mass = torch.zeros(1, CLASSES, PLACES, WIDTH), torch.zeros(1, CLASSES, PLACES)
    for parts in zip(x[None].split(6, 1), labels[None].split(6, 1), strict=True):
        points, mass = absorb(points, mass, *parts)
    return points, mass


def drawn(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, WIDTH, generator=generator), torch.randint(CLASSES, (num,), generator=generator)


def by_hand(x, labels, weights):
    """Class -> list of (point, mass): the formula, in float64."""
    found = {c: [] for c in range(CLASSES)}
    for point, label, weight in zip(x.double().numpy(), labels.tolist(), weights.tolist(), strict=True):
        own = found[label]
        own.append((point, weight))
        if len(own) > PLACES:
            pairs = [(i, j) for j in range(len(own)) for i in range(j)]
            costs = [
                own[i][1] * own[j][1] / (own[i][1] + own[j][1]) * np.square(own[i][0] - own[j][0]).sum()
                for i, j in pairs
            ]
            i, j = pairs[int(np.argmin(costs))]
            mass = own[i][1] + own[j][1]
            mean = (own[i][0] * own[i][1] + own[j][0] * own[j][1]) / mass
            found[label] = [pair for k, pair in enumerate(own) if k not in (i, j)] + [(mean, mass)]
    return found


def assert_are(points, mass, expected):
    for c, pairs in expected.items():
        taken = mass[0, c] > 0
        found = sorted(torch.cat([mass[0, c, :, None], points[0, c]], 1)[taken].tolist())
        np.testing.assert_allclose(found, sorted([m, *p] for p, m in pairs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num", [5, 12, 60])
def test_prototypes_are_their_formula(num):
    x, labels = drawn(num)
    points, mass = read(x, labels)
    assert_are(points, mass, by_hand(x, labels, torch.ones(num)))
    for c in range(CLASSES):
        torch.testing.assert_close(mass[0, c].sum(), (labels == c).sum().float())
        torch.testing.assert_close(mass[0, c] @ points[0, c], x[labels == c].sum(0), atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing():
    points, mass = read(*drawn(40))
    points[0, 0, 1] = points[0, 0, 2]  # two that could become one for nothing
    again = absorb(points, mass, torch.full((1, 2, WIDTH), 7.0), torch.tensor([[-100, -100]]))
    assert torch.equal(again[0], points) and torch.equal(again[1], mass)


def test_tasks_of_a_batch_do_not_mix():
    streams = [drawn(30, seed) for seed in (1, 2)]
    alone = [read(*stream) for stream in streams]
    points, mass = torch.zeros(2, CLASSES, PLACES, WIDTH), torch.zeros(2, CLASSES, PLACES)
    together = absorb(points, mass, *(torch.stack(parts) for parts in zip(*streams, strict=True)))
    assert not points.any() and not mass.any()  # they are not changed
    for part in range(2):
        torch.testing.assert_close(together[part], torch.cat([a[part] for a in alone]), atol=1e-5, rtol=1e-5)


def test_united_prototypes_are_those_of_reading_one_set_after_the_other():
    one, other = read(*drawn(9, 1)), read(*drawn(30, 2))
    places = torch.arange(CLASSES).repeat_interleave(PLACES)
    points, masses = (torch.cat([a.flatten(0, 2), b.flatten(0, 2)]) for a, b in zip(one, other, strict=True))
    taken = masses > 0
    assert_are(*unite(one, other), by_hand(points[taken], places.repeat(2)[taken], masses[taken]))
