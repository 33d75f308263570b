"""`ClassRows`: it starts from the nearest class mean, and what it learns keeps to the rules of a state."""

import pytest
import torch

from hf_iai.heads import ClassRows
from hf_iai.heads.class_rows import _trust, _wrong, united
from hf_iai.label_names import with_classes

TASKS, CLASSES, WIDTH, CHUNK = 3, 5, 12, 8


def stream(seed=0, tasks=TASKS, classes=CLASSES, num_chunks=3, spread=0.5):
    """Unit features around a centre for each class, (B, N, d), and labels (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(tasks, classes, WIDTH, generator=generator)
    orders = [torch.randperm(num_chunks * CHUNK, generator=generator) for _ in range(tasks)]
    labels = torch.stack(orders) % classes  # every class is there
    features = centres.gather(1, labels.unsqueeze(-1).expand(-1, -1, WIDTH))
    features = features + spread * torch.randn(features.shape, generator=generator)
    return torch.nn.functional.normalize(features, dim=-1), labels


def disturbed(scale=0.05) -> ClassRows:
    """A head whose networks have a part in the rows."""
    torch.manual_seed(1)
    head = ClassRows()
    with torch.no_grad():
        for network in (head.of_task, head.of_class):
            network[-1].weight.normal_(0, scale)
            network[-1].bias.fill_(0.2)
    return head


def read(head, features, labels, classes=CLASSES, kept=None):
    kept = kept or head.initial(len(features), classes, features.shape[-1])
    for x, y in zip(features.split(CHUNK, 1), labels.split(CHUNK, 1), strict=True):
        kept = head(kept, x, y)
    return kept


def logits(head, kept, queries):
    rows, bias = head.rows(kept)
    return queries @ rows.mT + bias.unsqueeze(1)


def assert_close(one, other, atol=1e-5):
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=atol, rtol=1e-4, msg=name)


def test_starts_from_the_nearest_class_mean():
    head, (features, labels) = ClassRows(), stream()
    kept = read(head, features, labels)
    rows, bias, penalty, sharpness, doubts = head._discriminant(kept)
    for task in range(TASKS):
        for c in range(CLASSES):
            mean = features[task, labels[task] == c].mean(0)
            torch.testing.assert_close(rows[task, c] / 15, mean, atol=1e-6, rtol=0)
            torch.testing.assert_close(bias[task, c] / 15, -mean.square().sum() / 2, atol=1e-6, rtol=0)
    assert torch.equal(sharpness, torch.ones(TASKS, 1)) and torch.allclose(penalty, torch.full((TASKS,), 3.84 / WIDTH))
    assert torch.equal(doubts[:, 0], torch.zeros(TASKS))
    torch.testing.assert_close(head.rows(kept)[0], rows + kept["fitted"][..., :-1])
    torch.testing.assert_close(head.rows(kept)[1], bias + kept["fitted"][..., -1])


@pytest.mark.parametrize("make", [ClassRows, disturbed], ids=["start", "disturbed"])
def test_a_batch_is_its_tasks(make):
    head, (features, labels) = make(), stream()
    together = read(head, features, labels)
    for task in range(TASKS):
        alone = read(head, features[task : task + 1], labels[task : task + 1])
        assert_close(alone, {name: t[task : task + 1] for name, t in together.items()})


def test_padding_changes_nothing():
    head, (features, labels) = disturbed(), stream()
    kept = read(head, features, labels)
    nothing = head(kept, torch.full((TASKS, CHUNK, WIDTH), torch.nan), torch.full((TASKS, CHUNK), -100))
    assert all(torch.equal(kept[name], nothing[name]) for name in kept)
    x, y = features[:, :CHUNK], labels[:, :CHUNK]
    some = y.clone()
    some[1] = -100
    mixed = head(kept, x, some)
    assert all(torch.equal(kept[name][1], mixed[name][1]) for name in kept)
    longer = head(kept, torch.nn.functional.pad(x, (0, 0, 0, 3)), torch.nn.functional.pad(y, (0, 3), value=-100))
    assert_close(head(kept, x, y), longer)


def test_order_matters_only_to_guesses_and_to_the_fit():
    features, labels = stream()
    head = disturbed()
    forward, backward = (read(head, f, y) for f, y in ((features, labels), (features.flip(1), labels.flip(1))))
    at_once = head(head.initial(TASKS, CLASSES, WIDTH), features, labels)
    for other in (backward, at_once):
        assert_close(*({name: kept[name] for name in ("count", "total", "moment")} for kept in (forward, other)))
    assert forward["mass"].eq(1).sum() == labels.numel()  # no class has more than 16 examples: all are kept
    same_guesses = ({**kept, "guessed": forward["guessed"]} for kept in (forward, backward, at_once))
    best = [to_the_minimum(head, kept)["fitted"] for kept in same_guesses]
    torch.testing.assert_close(best[1], best[0], atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(best[2], best[0], atol=2e-2, rtol=1e-2)


def to_the_minimum(head, kept):
    for _ in range(50):
        kept = kept | {"fitted": head._fit(kept, torch.ones(len(kept["count"]), dtype=torch.bool)).detach()}
    return kept


def test_the_fit_minimises_the_loss_of_the_examples():
    """At the minimum the gradient is 0: with p under rows U + V, sum_j u_j (p_j - y_j) z_j + lambda V = 0."""
    features, labels = stream()
    head = disturbed()
    with torch.no_grad():
        kept = to_the_minimum(head, read(head, features, labels))
        weights = head._discriminant(kept)
    rows, bias, penalty, sharpness, doubts = weights
    for task in range(TASKS):
        taken = kept["mass"][task] > 0
        points, mass = kept["prototype"][task][taken], kept["mass"][task][taken]
        said = torch.arange(CLASSES).unsqueeze(1).expand_as(taken)[taken]
        with torch.no_grad():
            prior, one_hot = points @ rows[task].T + bias[task], torch.nn.functional.one_hot(said, CLASSES).float()
            mass = mass * _trust(prior[None], one_hot[None], doubts[task : task + 1]).flatten()
        fitted = kept["fitted"][task].clone().requires_grad_()
        scores = points @ (rows[task] + fitted[:, :-1]).T + bias[task] + fitted[:, -1]
        nats = torch.nn.functional.cross_entropy(scores, said, reduction="none")
        ((nats * mass).sum() + penalty[task] / 2 * fitted.square().sum()).backward()
        assert fitted.grad.abs().max() < 0.02
        found = head.rows(kept)
        torch.testing.assert_close(found[0][task], sharpness[task] * (rows[task] + kept["fitted"][task, :, :-1]))
        torch.testing.assert_close(found[1][task], sharpness[task] * (bias[task] + kept["fitted"][task, :, -1]))


def test_a_contradicted_label_is_trusted_less():
    """q = exp(-doubt sigmoid(-against - margin)); margins 5, -5 and 0, doubt 2 beyond 3."""
    logits = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [1.0, 1.0]]])
    said = torch.tensor([[[1.0, 0.0]] * 3])[0]
    q = _trust(logits, said, torch.tensor([[2.0, 3.0]])).flatten()
    expected = [(-2 * torch.sigmoid(torch.tensor(-3.0 - margin))).exp() for margin in (5.0, -5.0, 0.0)]
    torch.testing.assert_close(q, torch.stack(expected))
    assert q[1] < 0.2 < 0.9 < q[2] < q[0]
    assert torch.equal(_trust(logits, said, torch.tensor([[0.0, 3.0]])).flatten(), torch.ones(3))


def test_guesses_are_those_of_the_rows_before():
    head, (features, labels) = disturbed(), stream(spread=1.5)
    half = 2 * CHUNK
    before = read(head, features[:, :half], labels[:, :half])
    after = head(before, features[:, half:], labels[:, half:])
    scores = logits(head, before, features[:, half:])
    p = scores.softmax(-1).gather(2, labels[:, half:].unsqueeze(-1)).squeeze(-1)
    rank = (scores > scores.gather(2, labels[:, half:].unsqueeze(-1))).sum(-1)  # of 0 to 4; half of the others: 3, 4
    assert {0, 1, 2, 3, 4} == set(rank.flatten().tolist())
    expected = 2 * scores.softmax(-1).sort(-1).values[..., :2].sum(-1)
    sums = [torch.ones_like(p), rank == 0, p, 2 * (rank > 2), expected]
    found = torch.stack([values.sum(1) for values in sums], -1)
    torch.testing.assert_close(after["guessed"], before["guessed"] * 0.99**CHUNK + found, atol=1e-4, rtol=1e-4)
    assert not read(head, features[:, :CHUNK], labels[:, :CHUNK])["guessed"].any()  # nothing to guess from


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_share_of_wrong_labels_is_estimated(num_classes, share):
    """By a head that doubts, and whose rows are sharp: those that are fitted to wrong labels expect wrong labels."""
    head, draw = ClassRows(), torch.Generator().manual_seed(1)
    rho, doubt, scale, penalty, sharpness, distance = 0.0, 1.0, 0.0, 0.0, 0.3, 0.0
    head.of_task[-1].bias.data = torch.tensor([rho, doubt, scale, penalty, sharpness, distance])
    features, labels = stream(classes=num_classes, num_chunks=50)
    wrong = torch.rand(labels.shape, generator=draw) < share
    other = torch.randint(1, num_classes, labels.shape, generator=draw)
    kept = read(head, features, (labels + wrong * other) % num_classes, num_classes)
    assert abs(_wrong(kept).mean() - share) < 0.07


def test_a_class_of_32_examples_is_kept_whole():
    features, labels = torch.nn.functional.normalize(torch.randn(1, 40, WIDTH), dim=-1), torch.zeros(1, 40).long()
    head = ClassRows()
    kept = head(head.initial(1, 1, WIDTH), features[:, :32], labels[:, :32])
    torch.testing.assert_close(kept["prototype"][0, 0].sort(0).values, features[0, :32].sort(0).values)
    assert head(kept, features[:, 32:], labels[:, 32:])["mass"].sum() == 40


def test_labels_that_contradict_all_rows_count_as_wrong_and_no_more():
    kept = ClassRows.initial(1, 2, WIDTH)
    assert _wrong(kept) == 0
    assert _wrong(kept | {"guessed": torch.tensor([[5.0, 0.0, 0.0, 40.0, 1.0]])}) == 1
    assert _wrong(kept | {"guessed": torch.tensor([[5.0, 5.0, 5.0, 0.0, 1.0]])}) == 0


def test_turning_the_features_turns_the_rows():
    features, labels = stream()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)))[0]
    head = disturbed()
    rows, bias = head.rows(read(head, features, labels))
    turned, same = head.rows(read(head, features @ turn, labels))
    torch.testing.assert_close(turned, rows @ turn, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(same, bias, atol=1e-3, rtol=1e-3)


def test_rows_stay_in_the_span_of_what_was_read():
    head, (features, labels) = disturbed(), stream()
    features[..., WIDTH // 2 :] = 0
    rows, _ = head.rows(read(head, features, labels))
    assert rows[..., : WIDTH // 2].abs().max() > 1
    assert not rows[..., WIDTH // 2 :].any()


def test_classes_first_met_later():
    head, (features, labels) = disturbed(), stream()
    early = labels % 2
    kept = read(head, features, early, classes=2)
    with_room = with_classes(kept, CLASSES)
    torch.testing.assert_close(
        logits(head, with_room, features)[..., :2], logits(head, kept, features), atol=1e-4, rtol=1e-4
    )
    assert (head.rows(with_room)[1][:, 2:] == -1e4).all()
    assert_close(with_room, read(head, features, early))
    went_on = read(head, features, labels, kept=with_room)
    assert logits(head, went_on, features).isfinite().all()
    assert (logits(head, went_on, features).argmax(-1) >= 2).any()


def test_nothing_read_is_no_opinion():
    head = disturbed()
    scores = logits(head, head.initial(1, CLASSES, WIDTH), torch.randn(1, 2, WIDTH))
    torch.testing.assert_close(scores.softmax(-1), torch.full((1, 2, CLASSES), 1 / CLASSES))


def test_every_parameter_learns():
    torch.manual_seed(0)
    head = ClassRows()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    before = {name: parameter.clone() for name, parameter in head.named_parameters()}
    losses = []
    for step in range(30):
        features, labels = stream(seed=step, num_chunks=4, spread=1.0)
        kept = read(head, features[:, :-CHUNK], labels[:, :-CHUNK])
        scores = logits(head, kept, features[:, -CHUNK:])
        losses.append(torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, -CHUNK:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in head.named_parameters())
    assert sum(losses[-5:]) < sum(losses[:5])


def test_states_unite():
    head, (features, labels) = disturbed(), stream(num_chunks=4)
    half = 2 * CHUNK
    one, two = read(head, features[:, :half], labels[:, :half]), read(head, features[:, half:], labels[:, half:])
    both = united(one, two)
    for name in ("count", "total", "moment", "guessed"):
        torch.testing.assert_close(both[name], one[name] + two[name])
    torch.testing.assert_close(both["mass"].sum(-1), both["count"], atol=1e-4, rtol=1e-4)
    share = (one["count"] / both["count"]).unsqueeze(-1)
    torch.testing.assert_close(both["fitted"], share * one["fitted"] + (1 - share) * two["fitted"])
    assert (logits(head, both, features).argmax(-1) == labels).float().mean() > 0.9
    nothing = head.initial(TASKS, CLASSES, WIDTH)
    assert_close(united(one, nothing), one)
    assert_close(united(nothing, one), one)


def test_a_long_stream_keeps_its_size_and_stays_finite():
    features, labels = stream(num_chunks=200)
    head = disturbed().eval()
    with torch.no_grad():
        short, long = (read(head, features[:, : n * CHUNK], labels[:, : n * CHUNK]) for n in (100, 200))
    assert all(long[name].shape == short[name].shape and long[name].isfinite().all() for name in short)
    torch.testing.assert_close(long["mass"].sum(-1), long["count"], atol=1e-2, rtol=1e-4)
    assert long["fitted"].norm() < 1.5 * short["fitted"].norm()
