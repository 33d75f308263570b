"""What reading chunks means: averages, merging, masks, the control."""

import pytest
import torch
from tiny import AVERAGES, FAMILIES, STATES, VARIANTS, VOCAB, chunks, ids, largest_difference, make_base, make_model

from hf_iai import TaskState
from hf_iai.bases.base import Base
from hf_iai.bases.places import positions_of
from hf_iai.signals import TokenPooling, read_observations


@pytest.mark.parametrize("regime", ["explicit", "parametric"])
@pytest.mark.parametrize("state_type", STATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_recent_untrained_is_fewer_shots(family, state_type, regime):
    model = make_model(family, trained=False, state_type=state_type, regime=regime, accumulation="recent")
    text, query = ids(2, 30), ids(2, 9, seed=1)
    state = model.adapt([{"input_ids": text[:, a:b]} for a, b in ((0, 3), (3, 17), (17, 30))])
    expected = make_base(family)(torch.cat([text[:, -4:], query], 1)).logits[:, 4:]
    assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("state_type", STATES)
def test_recent_with_pinned_bos(state_type):
    model = make_model(trained=False, state_type=state_type, accumulation="recent", pin_bos=True)
    text, query = ids(1, 12), ids(1, 5, seed=1)
    state = model.adapt([{"input_ids": text}])
    expected = make_base()(torch.cat([torch.tensor([[1]]), text[:, -3:], query], 1)).logits[:, 4:]
    assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-5
    first = next(iter(model.core.state.start))  # before anything was read, too
    start, now = model.initial_state().tensors[first], state.tensors[first]
    assert (start[..., 0, :] - now[..., 0, :]).abs().max() < 1e-6
    assert torch.equal(start[0, ..., 1:, :], model.core.state.start[first][..., 1:, :])


def test_recent_keeps_start_in_slots_not_yet_filled():
    model = make_model(accumulation="recent")
    start, state = model.initial_state(), model.adapt([{"input_ids": ids(1, 3)}])
    assert torch.equal(state.tensors["key"][..., 3:, :], start.tensors["key"][..., 3:, :])
    assert not torch.equal(state.tensors["key"][..., :3, :], start.tensors["key"][..., :3, :])


@pytest.mark.parametrize(("family", "state_type", "regime"), AVERAGES)
def test_average_without_correction_is_the_mean_of_single_chunk_states(family, state_type, regime):
    model = make_model(family, state_type=state_type, regime=regime, correction=False)
    support = chunks(5)
    singles = [model.adapt([chunk]) for chunk in support]
    sequence = model.adapt(support)
    for name, tensor in sequence.tensors.items():
        mean = torch.stack([s.tensors[name] for s in singles]).mean(0)
        assert (tensor - mean).abs().max() < 1e-5
    for other in (
        model.adapt(support[::-1]),
        TaskState.merge(singles),
        TaskState.merge([model.adapt(support[:2]), model.adapt(support[2:])]),
        model.adapt(support, parallel=3),
    ):
        assert largest_difference(sequence, other) < 1e-5
        assert torch.equal(other.step, sequence.step) and torch.equal(other.num_tokens, sequence.num_tokens)


@pytest.mark.parametrize(("family", "state_type", "regime"), AVERAGES)
def test_trained_average_reads_in_parallel_and_merges_where_nothing_is_forgotten(family, state_type, regime):
    model = make_model(family, state_type=state_type, regime=regime)
    with torch.no_grad():
        model.core.average.forgetting.fill_(0.1)
    support = chunks(5)
    assert largest_difference(model.adapt(support), model.adapt(support, parallel=4)) < 1e-5
    singles = [model.adapt([chunk]) for chunk in support]
    assert max((s.tensors["precision"] - 1).abs().max() for s in singles) > 0.01, "the precisions are not at work"
    assert largest_difference(model.adapt(support), TaskState.merge(singles)) > 1e-3, "the rates are not at work"
    with torch.no_grad():
        model.core.average.forgetting.zero_()
    singles = [model.adapt([chunk]) for chunk in support]
    assert largest_difference(model.adapt(support), TaskState.merge(singles)) < 1e-5


@pytest.mark.parametrize("config", [{}, {"accumulation": "recent"}, {"signal": "gradients"}])
def test_a_row_without_tokens_has_not_read(config):
    model, chunk = make_model(**config), chunks(1)[0]
    before = model.adapt(chunks(1, seed=1))
    mask = torch.ones_like(chunk["input_ids"])
    mask[0] = 0
    after = model.adapt([chunk | {"attention_mask": mask}], state=before)
    assert after.step.tolist() == [1, 2] and after.num_tokens.tolist() == [10, 20]
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor[0], before.tensors[name][0]) and tensor.isfinite().all()


def test_weights_follow_their_formula():
    """theta after three chunks, against a direct sum over precision and age."""
    model = make_model()
    support = chunks(3)
    state, singles = model.adapt(support), [model.adapt([chunk]) for chunk in support]
    rate = model.core.average.rate().detach()
    assert rate.min() == 0 and rate.max() > 0
    weights = torch.stack([s.tensors["precision"] * (-rate * 10 * (2 - i)).exp() for i, s in enumerate(singles)])
    for name in ("key", "value"):
        values = torch.stack([s.tensors[name] for s in singles])
        expected = (weights.unsqueeze(-1) * values).sum(0) / weights.sum(0).unsqueeze(-1)
        assert (state.tensors[name] - expected).abs().max() < 1e-5
    assert (state.tensors["precision"] - weights.mean(0)).abs().max() < 1e-5


def test_a_forgetting_rate_below_zero_counts_as_zero_and_can_come_back():
    average = make_model().core.average
    with torch.no_grad():
        average.forgetting.fill_(-0.5)
    average.rate().sum().backward()
    assert torch.equal(average.rate(), torch.zeros_like(average.forgetting))
    assert (average.forgetting.grad != 0).all()


def test_pooling_against_a_loop_over_tokens():
    torch.manual_seed(0)
    pool = TokenPooling(torch.randn(1, 1, 3, 8))
    pool.importance.data.normal_()
    keys, values = torch.randn(1, 1, 1, 5, 8), torch.randn(1, 1, 1, 5, 8)
    rate, mask = torch.tensor([[[0.0, 0.1, 0.5]]]), torch.tensor([[1, 0, 1, 1, 0]])
    pooled = pool(keys, values, mask, rate)
    sums, totals = torch.zeros(2, 3, 8), torch.zeros(3)
    for t, age in ((0, 2), (2, 1), (3, 0)):
        key, value = keys[0, 0, 0, t], values[0, 0, 0, t]
        normed = key / key.square().mean().sqrt() / 8**0.5
        share = (pool.centroids[0, 0] @ normed).softmax(0) * (pool.importance[0, 0] @ normed).exp()
        share = share * (-rate[0, 0] * age).exp()
        sums += share[:, None] * torch.stack([key, value])[:, None]
        totals += share
    assert (pooled.mass[0, 0, 0] - totals).abs().max() < 1e-5
    assert (pooled.keys[0, 0, 0] - sums[0] / totals[:, None]).abs().max() < 1e-5
    assert (pooled.values[0, 0, 0] - sums[1] / totals[:, None]).abs().max() < 1e-5


def test_the_delta_rule_starts_as_the_plain_average():
    """Nothing is taken out before anything is learned: mean, parallel and merge are those of the average."""
    support, plain = chunks(5), make_model(trained=False)
    model = make_model(trained=False, delta_rule=True)
    expected = plain.adapt(support)
    assert largest_difference(model.adapt(support), expected) == 0
    assert largest_difference(TaskState.merge([model.adapt([chunk]) for chunk in support]), expected) < 1e-5


def test_the_delta_rule_against_a_loop_over_tokens():
    """The second chunk is averaged in after what the first one's slots recall at each of its tokens is taken out."""
    model = make_model(delta_rule=True)
    base, core = model.reader.base, model.core
    with torch.no_grad():
        core.average.forgetting.zero_()
        core.delta.write.weight.normal_(std=0.3)
    first, second = chunks(2, batch=1)
    one, alone, both = model.adapt([first]), model.adapt([second]), model.adapt([first, second])
    with torch.no_grad():
        reading = read_observations(base, core.state, second["input_ids"], torch.ones(1, 10, dtype=torch.long))
        values = torch.stack([v for _, v in reading.keys_values], 1)[..., :10, :]  # (1, L, H, C, D)
        keys = torch.stack([k for k, _ in reading.keys_values], 1)[..., :10, :]
        pooled = core.state.pool(base.rotate(keys, -reading.positions), values, reading.mask, core._rate())
        expected = alone.tensors["value"].clone()
        for t in range(10):
            address = pooled.address[:, :, :, t]  # (1, L, H, P)
            recalled = (address.unsqueeze(-1) * one.tensors["value"]).sum(-2).flatten()  # (L * H * D,)
            hidden = torch.nn.functional.gelu(core.delta.read(recalled / recalled.square().mean().sqrt()))
            length = (values[:, :, :, t].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            replaced = length * core.delta.write(hidden).view(values[:, :, :, t].shape)  # (1, L, H, D)
            expected -= pooled.written[..., t].unsqueeze(-1) * replaced.unsqueeze(-2)
    weights = torch.stack([one.tensors["precision"], alone.tensors["precision"]]).unsqueeze(-1)
    expected = (weights * torch.stack([one.tensors["value"], expected])).sum(0) / weights.sum(0)
    assert (both.tensors["value"] - expected).abs().max() < 1e-4
    without = (weights * torch.stack([one.tensors["value"], alone.tensors["value"]])).sum(0) / weights.sum(0)
    assert (both.tensors["value"] - without).abs().max() > 1e-2, "the delta rule is not at work"


def test_the_delta_rule_takes_long_chunks_in_parts(monkeypatch):
    model, support = make_model(delta_rule=True), chunks(2, size=20)
    whole = model.adapt(support)
    monkeypatch.setattr("hf_iai.heads.delta.TOKENS_AT_ONCE", 7)
    assert largest_difference(model.adapt(support), whole) < 1e-5


def test_the_delta_rule_reads_in_parallel_and_stays_bounded():
    model = make_model(delta_rule=True)
    with torch.no_grad():
        model.core.delta.write.weight.normal_(std=1.0)
    support = chunks(5)
    assert largest_difference(model.adapt(support), model.adapt(support, parallel=3)) < 1e-4
    sizes = [s.tensors["value"].abs().max() for s in model.adapt_steps(chunks(60))]
    assert max(sizes[40:]) < 2 * max(sizes[:40])


@pytest.fixture
def surprises(monkeypatch):
    """Surprisals of 0 to 8 nats by token id: those of a tiny base all lie near the cap."""

    def by_token(self, hidden, token_ids, mask):
        of_id = 8 * torch.rand(VOCAB, generator=torch.Generator().manual_seed(3))
        of_id[:20] /= 10
        return of_id[token_ids] * mask

    monkeypatch.setattr(Base, "surprisal", by_token)


def test_kept_slots_against_a_loop_over_tokens(surprises):
    """Of all tokens read: the latest, and of the others those after most surprise for their age, oldest first."""
    model = make_model(trained=False, num_state_tokens=14, num_kept_tokens=12)
    base, core = model.reader.base, model.core
    tokens = []  # (age, trace, values (L, H, D)) of every token
    support = [ids(1, 30), ids(1, 3, seed=1), torch.cat([ids(1, 12, seed=2), torch.arange(5, 13)[None]], 1)]
    with torch.no_grad():
        for i, chunk in enumerate(support):
            reading = read_observations(base, core.state, chunk, torch.ones_like(chunk), surprisal=True)
            capped = reading.surprisal[0].clamp_max(4).tolist()
            later = sum(c.shape[1] for c in support[i + 1 :])
            for t in range(chunk.shape[1]):
                felt = sum(s / 2 ** (t - j + 1) for j, s in enumerate(capped[: t + 1]) if t - j < 8)
                values = torch.stack([v[0, :, t] for _, v in reading.keys_values])
                tokens.append((later + chunk.shape[1] - 1 - t, felt, values))
    by_score = sorted(tokens, key=lambda token: token[1] - 0.005 * token[0])
    assert not {id(t) for t in tokens[-3:]} & {id(t) for t in by_score[-12:]}  # the latest are there for their age
    others = sorted(tokens[:-3], key=lambda token: token[1] - 0.005 * token[0])[-9:]
    expected = sorted(others, key=lambda token: -token[0]) + tokens[-3:]
    state = model.adapt([{"input_ids": c} for c in support])
    assert state.tensors["kept_age"].flatten().tolist() == [age for age, _, _ in expected]
    for j, (_, felt, values) in enumerate(expected):
        assert abs(state.tensors["kept_trace"].flatten()[j].item() - felt) < 1e-4
        assert (state.tensors["kept_value"][0, :, :, j] - values).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_slots_in_sequence_in_parallel_and_merged(surprises, family):
    model = make_model(family, num_state_tokens=10, num_kept_tokens=8, correction=False)
    support = chunks(5)
    sequence = model.adapt(support)
    for other in (
        TaskState.merge([model.adapt([chunk]) for chunk in support]),
        TaskState.merge([model.adapt(support[:2]), model.adapt(support[2:])]),
        model.adapt(support, parallel=3),
    ):
        assert torch.equal(other.tensors["kept_age"], sequence.tensors["kept_age"])
        assert largest_difference(sequence, other) < 1e-5


def test_kept_slots_of_states_that_read_different_amounts_merge(surprises):
    model = make_model(num_state_tokens=10, num_kept_tokens=8, correction=False)
    first, second = ids(2, 10), ids(2, 7, seed=1)
    ragged = [{"input_ids": second, "attention_mask": torch.tensor([[1] * 5 + [0] * 2, [0] * 7])}]
    start = model.initial_state(2)
    merged = TaskState.merge([model.adapt([{"input_ids": first}]), model.adapt(ragged, state=start)])
    sequence = model.adapt([{"input_ids": first}, *ragged])
    assert largest_difference(merged, sequence) < 1e-5


def test_surprisal_against_a_loop_over_tokens():
    base, text = Base(make_base()), ids(2, 6)
    text[0, :2] = 0
    mask = (text > 0).long()
    hidden = base.read(base.no_prefix(2), base.embed(text), mask, positions_of(mask), record=6)[0]
    surprisal = base.surprisal(hidden, text, mask)
    log_p = base.model(text, attention_mask=mask, position_ids=positions_of(mask)).logits.log_softmax(-1)
    for row, first in ((0, 2), (1, 0)):
        assert (surprisal[row, : first + 1] == 0).all()
        for t in range(first + 1, 6):
            assert abs(surprisal[row, t] + log_p[row, t - 1, text[row, t]]) < 1e-5


def test_kept_slots_not_yet_filled_show_the_start():
    model = make_model(num_state_tokens=10, num_kept_tokens=8)
    state = model.adapt([{"input_ids": ids(1, 3)}])
    start = model.core.state.visible(model.reader.base, model.initial_state().tensors)
    shown = model.core.state.visible(model.reader.base, state.tensors)
    assert torch.equal(start["value"][0], model.core.state.start["value"])
    assert torch.equal(shown["value"][..., 2:7, :], start["value"][..., 2:7, :])
    assert (shown["value"][..., 7:, :] - start["value"][..., 7:, :]).abs().amin() > 0
    corrected = model.core.corrected(model.reader.base, state)
    assert all(t.isfinite().all() for t in corrected.values())


def test_one_kept_slot_holds_the_latest_token():
    state = make_model(num_state_tokens=4, num_kept_tokens=1).adapt([{"input_ids": ids(1, 9)}])
    assert state.tensors["kept_age"].flatten().tolist() == [0] and state.tensors["kept_value"].all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotation_re_places_keys_exactly(family):
    """Keys of a token read at position p, rotated by q - p, are those of the token read at q."""
    base = Base(make_base(family))
    embeddings, mask = base.embed(ids(1, 6)), torch.ones(1, 6, dtype=torch.long)

    def first_layer_keys(start: int) -> torch.Tensor:
        positions = torch.arange(start, start + 6)[None]
        return base.read(base.no_prefix(1), embeddings, mask, positions, record=6)[1][0][0]

    moved = base.rotate(first_layer_keys(3)[:, None], torch.full((1, 6), 20))[:, 0]
    assert (moved - first_layer_keys(23)).abs().max() < 1e-4


@pytest.mark.parametrize("state_type", [*STATES, *VARIANTS])
def test_columns_that_are_padding_for_all_are_not_read(state_type):
    """Bitwise."""
    model, text = make_model(state_type=state_type), ids(1, 7, seed=1)
    row = model.adapt([{"input_ids": text}])
    for left in (0, 3):
        padded = torch.cat([ids(1, left, seed=2), text, ids(1, 3 - left, seed=3)], 1)
        mask = torch.tensor([[0] * left + [1] * 7 + [0] * (3 - left)])
        same = model.adapt([{"input_ids": padded, "attention_mask": mask}])
        assert all(torch.equal(same.tensors[n], row.tensors[n]) for n in row.tensors)
