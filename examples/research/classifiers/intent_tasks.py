"""Tasks of `meta_train_intents`: labelled texts as features of a frozen sentence encoder, and queries.

A task consists of some labels of one corpus, a stream of examples of these labels, and the same number of queries for
each. Each of the two corpora, CLINC and HWU, is split by topic. A split by label would not be enough: both corpora
have weather and music, so a held-out label could occur in training under another name.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.research.classifiers.row_training import CHUNK, MOST_CHUNKS, Tasks
from hf_iai.evaluation.accuracy import features_of

QUERIES = 10  # of each class
FILES = {"clinc105": ("train", "val", "test"), "hwu64": ("train", "test")}
# CLINC names the domain of an intent; the scenario of HWU is what its label starts with.
TOPICS = {
    "utility": "utility alarm datetime weather qa",
    "talk": "small_talk meta general audio",
    "home": "home music play lists iot calendar",
    "travel": "auto_and_commute transport",
    "food": "kitchen_and_dining cooking takeaway recommendation",
    "work": "work email social news",
}
HELD_OUT = [("utility", "travel"), ("talk", "work"), ("home", "food")]  # each topic is tested in one of three splits


class Corpus(NamedTuple):
    """Labelled features of one corpus, and the topic of each label."""

    name: str
    features: Tensor  # (N, d), centred, unit length
    rows: dict[str, np.ndarray]  # label -> which of them
    topics: dict[str, str]  # label -> topic

    def labels(self, topics: tuple[str, ...], held_out: bool) -> list[str]:
        return sorted(label for label, topic in self.topics.items() if (topic in topics) == held_out)


# ---------------------------------------------------------------- features


def embed(texts: list[str], model, tokenizer, batch_size: int = 128) -> Tensor:  # (N, d)
    """The features that a model with a linear state sees."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of similar length waste no padding
    features = []
    for start in tqdm(range(0, len(texts), batch_size), "embed"):
        batch = [texts[i] for i in order[start : start + batch_size]]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        features.append(torch.from_numpy(features_of(model, inputs)))
    return torch.cat(features)[torch.tensor(order).argsort()]


def read_texts(data: Path) -> dict[str, list[dict]]:
    """Examples of each corpus, without texts that occur in both corpora or under two labels."""
    found: dict[str, set] = {}
    examples = {name: {} for name in FILES}
    for name, files in FILES.items():
        for line in (line for file in files for line in (data / name / f"{file}.jsonl").read_text().splitlines()):
            example = json.loads(line)
            text = " ".join(example["text"].lower().split())
            found.setdefault(text, set()).add((name, example["label"]))
            examples[name][text] = example | {"text": text}
    return {name: [e for t, e in rows.items() if len(found[t]) == 1] for name, rows in examples.items()}


def load_corpora(data: Path, cache: Path, model, tokenizer) -> list[Corpus]:
    """The features are kept in `cache`: embedding takes minutes."""
    topic_of = {domain: topic for topic, domains in TOPICS.items() for domain in domains.split()}
    corpora = []
    for name, examples in read_texts(data).items():
        file = cache / f"{name}.npy"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            np.save(file, embed([e["text"] for e in examples], model, tokenizer).numpy())
        labels = np.array([e["label"] for e in examples])
        topics = {e["label"]: topic_of[e.get("domain") or e["label"].split("_")[0]] for e in examples}
        rows = {label: np.flatnonzero(labels == label) for label in topics}
        corpora.append(Corpus(name, torch.from_numpy(np.load(file)), rows, topics))
    return corpora


# ---------------------------------------------------------------- tasks


def varied(rng: np.random.Generator, corpus: Corpus) -> Corpus:
    """As if from another source: features as they are, closer to the mean of their label, or with noise; a third each.

    Sources differ in how clean they are, and a reader that is trained on one of them meets another one.
    """
    kind, size, features = rng.integers(3), float(rng.uniform()), corpus.features
    if kind == 1:
        means = torch.empty_like(features)
        for rows in corpus.rows.values():
            means[rows] = features[rows].mean(0)
        features = features.lerp(means, 0.5 * size)
    if kind == 2:
        features = features + size * torch.randn_like(features) / features.shape[1] ** 0.5
    return corpus._replace(features=nn.functional.normalize(features, dim=-1))


def draw_task(
    rng: np.random.Generator,
    corpus: Corpus,
    labels: list[str],
    *,
    num_examples: int = CHUNK * MOST_CHUNKS,
    num_queries: int = QUERIES,
    imbalance: float = 1.0,
    noise: float = 0.0,
    num_early: int = 0,
) -> tuple[np.ndarray, ...]:
    """Rows and classes of the examples in reading order, and of the queries; they share no text.

    The class of every example is drawn at random; the last class is `imbalance` times as rare as the first. A share
    `noise` of the labels is wrong. The second half of the classes does not occur among the first `num_early` examples.
    """
    left = [list(rng.permutation(corpus.rows[label])) for label in rng.permutation(labels)]
    queries = np.array([[rows.pop() for _ in range(num_queries)] for rows in left])  # (C, q)
    weights = imbalance ** -np.linspace(0, 1, len(left))
    rows, classes = [], []
    for i in range(num_examples):
        open_ = weights * np.array([bool(r) for r in left])
        if i < num_early:
            open_[len(left) // 2 :] = 0
        classes.append(rng.choice(len(left), p=open_ / open_.sum()))
        rows.append(left[classes[-1]].pop())
    said = np.array(classes)
    wrong = rng.random(num_examples) < noise
    said[wrong] = (said[wrong] + rng.integers(1, max(len(left), 2), wrong.sum())) % len(left)
    return np.array(rows), said, queries.flatten(), np.repeat(np.arange(len(left)), num_queries)


def stack(corpora: list[Corpus], drawn: list[tuple[np.ndarray, ...]]) -> Tasks:
    """Tasks as one batch; task i was drawn from `corpora[i]`."""
    most = max(len(task[2]) for task in drawn)
    queries, targets = [], []
    for corpus, (_, _, rows, classes) in zip(corpora, drawn, strict=True):
        pad = most - len(rows)
        queries.append(corpus.features[np.pad(rows, (0, pad))])
        targets.append(torch.from_numpy(np.pad(classes, (0, pad), constant_values=-100)))
    features = torch.stack([c.features[task[0]] for c, task in zip(corpora, drawn, strict=True)])
    labels = torch.stack([torch.from_numpy(task[1]) for task in drawn])
    num_classes = max(int(task[3].max()) + 1 for task in drawn)
    return Tasks(features, labels, torch.stack(queries), torch.stack(targets), num_classes)


def evaluation_tasks(corpora: list[Corpus], split: int, ways: int | None, num: int, **options) -> list[tuple]:
    """`num` pairs (corpus, task) for each corpus, with `ways` of the held-out labels, or all of them for None."""
    rng = np.random.default_rng([2024, split, ways or 0])
    tasks = []
    for corpus in corpora:
        labels = corpus.labels(HELD_OUT[split], held_out=True)
        for _ in range(num):
            chosen = rng.choice(labels, ways, replace=False) if ways else labels
            tasks.append((corpus, draw_task(rng, corpus, list(chosen), **options)))
    return tasks
