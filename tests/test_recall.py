"""The tasks of examples/research/recall/associative_recall.py: who wrote what, when, and what the right answer is."""

from collections import Counter

import numpy as np
import pytest

from examples.research.recall.associative_recall import make_tokenizer
from examples.research.recall.recall_tasks import growing_episodes, key_ids, recall_episode, recall_episodes, value_ids


@pytest.mark.parametrize(("pairs", "rate", "chunks"), [(64, 0.0, 16), (64, 0.25, 20), (64, 1.0, 32), (7, 0.0, 2)])
def test_the_newest_value_counts(pairs, rate, chunks):
    for episode in recall_episodes(5, pairs, rate, seed=3):
        memory, times, age = {}, Counter(), {}
        (written,) = episode["support"]
        for number, ids in enumerate(np.array_split(written["input_ids"], range(8, len(written["input_ids"]), 8))):
            assert len(set(ids[::2].tolist())) == len(ids[::2]) <= 4, "a key twice in one chunk"
            for key, value in zip(ids[::2].tolist(), ids[1::2].tolist(), strict=True):
                assert memory.get(key) != value, "rewritten with the same value"
                memory[key], age[key] = value, chunks - number
                times[key] += 1
        assert episode["num_chunks"] == chunks and len(memory) == pairs
        assert {tuple(query["input_ids"]) for query in episode["query"]} == set(memory.items())
        assert sum(times.values()) == pairs + round(rate * pairs)
        for query, rewritten, since in zip(episode["query"], episode["rewritten"], episode["age"], strict=True):
            key, value = query["input_ids"]
            assert query["labels"] == [-100, value]
            assert (times[key] == 2) == rewritten and age[key] == since


def test_symbols_are_single_tokens_and_drawn_anew():
    tokenizer = make_tokenizer()
    assert tokenizer("k0 k127 v0 v63")["input_ids"] == [*key_ids(np.array([0, 127])), *value_ids(np.array([0, 63]))]
    one, two, again = (recall_episode(np.random.default_rng(seed)) for seed in (0, 1, 0))
    assert one == again and one["query"] != two["query"]
    asked = np.array([q["input_ids"] for q in one["query"]])
    assert set(asked[:, 0]) == set(key_ids(np.arange(64))) and set(asked[:, 1]) <= set(value_ids(np.arange(64)))


def test_training_tasks_grow():
    sizes = [len(e["support"][0]["input_ids"]) // 2 for e in growing_episodes(60, 64, 0.25, 64, seed=0)]
    assert max(sizes[:8]) <= 20 and sizes[30:].count(80) > 5 and sizes[30:].count(64) > 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_pairs": 65}, "65 pairs need as many keys"),
        ({"num_pairs": 3, "rewrite_rate": 1.0}, "needs a later chunk"),
        ({"rewrite_rate": 1.5}, "needs a later chunk"),
    ],
)
def test_impossible_tasks(values, message):
    with pytest.raises(ValueError, match=message):
        recall_episode(np.random.default_rng(0), **values)
