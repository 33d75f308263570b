"""`ClassRows`: at the start it is the nearest class mean, and what it learns keeps to the rules of a state."""

import pytest
import torch

from hf_iai.heads import ClassRows
from hf_iai.heads.class_rows import _of_task

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
        for network in (head.of_task, head.of_class, head.of_example):
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


def test_starts_as_the_nearest_class_mean():
    head, (features, labels) = ClassRows(), stream()
    rows, bias = head.rows(read(head, features, labels))
    for task in range(TASKS):
        for c in range(CLASSES):
            mean = features[task, labels[task] == c].mean(0)
            torch.testing.assert_close(rows[task, c] / 50, mean, atol=1e-6, rtol=0)
            torch.testing.assert_close(bias[task, c] / 50, -mean.square().sum() / 2, atol=1e-6, rtol=0)


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


def test_order_matters_only_to_what_is_learned_of_examples():
    features, labels = stream()
    head = disturbed()
    forward, backward = (read(head, f, y) for f, y in ((features, labels), (features.flip(1), labels.flip(1))))
    assert not torch.allclose(forward["correction"], backward["correction"], atol=1e-3)
    for parameter in head.of_example[-1].parameters():
        torch.nn.init.zeros_(parameter)
    forward, backward = (read(head, f, y) for f, y in ((features, labels), (features.flip(1), labels.flip(1))))
    assert_close(forward, backward)
    assert_close(forward, head(head.initial(TASKS, CLASSES, WIDTH), features, labels))


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
    with_room = head.grow(kept, CLASSES)
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


def test_the_correction_takes_the_steps_of_the_formula():
    features, labels = stream(num_chunks=2)
    labels[:, :CLASSES] = torch.arange(CLASSES)  # all classes are met in the first chunk
    head, first = disturbed(), CHUNK
    before = head(head.initial(TASKS, CLASSES, WIDTH), features[:, :first], labels[:, :first])
    after = head(before, features[:, first:], labels[:, first:])
    said = torch.nn.functional.one_hot(labels[:, first:], CLASSES).float()
    for task in range(TASKS):
        x, y = features[task, first:], said[task]
        v = head.of_example(head._judge(before, features[:, first:], said)[0])[task, ..., 1]
        p = (x @ head.rows(before)[0][task].T + head.rows(before)[1][task]).softmax(-1)
        common = after["total"][task].sum(0) / after["count"][task].sum()
        spread = after["moment"][task] - after["count"][task].sum() * torch.outer(common, common)
        sums = {name: tensor[task : task + 1] for name, tensor in after.items()}
        sigma = 3 * head.of_task(_of_task(sums))[0, 2]
        assert sigma > 0.1
        steps = torch.linalg.inv(torch.eye(WIDTH) + sigma * spread) @ (x - common).T  # (d, n)
        expected = 10 * (v * (y - p).abs()).T @ steps.T
        mean = before["correction"][task] / before["count"][task].unsqueeze(-1)
        found = after["correction"][task] / after["count"][task].unsqueeze(-1)
        torch.testing.assert_close(found - mean, expected, atol=1e-4, rtol=1e-3)


def test_a_sum_of_states_has_the_mean_of_their_corrections():
    head, (features, labels) = disturbed(), stream(num_chunks=4)
    half = 2 * CHUNK
    one, two = read(head, features[:, :half], labels[:, :half]), read(head, features[:, half:], labels[:, half:])
    both = {name: one[name] + two[name] for name in one}
    mean = [state["correction"] / state["count"].unsqueeze(-1) for state in (one, two, both)]
    share = (one["count"] / both["count"]).unsqueeze(-1)
    torch.testing.assert_close(mean[2], share * mean[0] + (1 - share) * mean[1])
    assert logits(head, both, features).isfinite().all()


def test_in_use_steps_shrink_where_sigma_fell_below_0():
    features, labels = stream(num_chunks=200)
    head = disturbed()
    with torch.no_grad():
        head.of_task[-1].weight[2].zero_()
        head.of_task[-1].bias[2] = -1.0  # sigma = -3
    sizes = {}
    for training in (True, False):
        head.train(training)
        for num in (100, 200):
            kept = read(head, features[:, : num * CHUNK], labels[:, : num * CHUNK])
            sizes[training, num] = (kept["correction"] / kept["count"].unsqueeze(-1)).norm()
    assert sizes[False, 200] < 1.5 * sizes[False, 100]  # by the logarithm of the examples, not by their number
    assert sizes[False, 200] < 0.1 * sizes[True, 200]
