"""Baselines of examples/meta_train_intents.py, refitted on all examples so far: accuracies of each task, on disk."""

import json
import warnings
from pathlib import Path

import numpy as np
from intent_tasks import CHUNK, Corpus
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from threadpoolctl import threadpool_limits
from tqdm import tqdm

FOLDS, STRENGTHS, FEW = 3, (0.1, 1.0, 10.0, 100.0), 10.0  # C where a class has fewer examples than there are folds


def nearest_mean(x: np.ndarray, y: np.ndarray, queries: np.ndarray, cosine: bool) -> np.ndarray:  # (S, d), (S,), (Q, d)
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    if cosine:
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    return classes[(queries @ means.T - 0.5 * np.square(means).sum(1)).argmax(1)]


def logistic_regression(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:  # (S, d), (S,), (Q, d)
    """C by cross-validation where every class that was read has an example for each fold."""
    if len(np.unique(y)) == 1:
        return np.full(len(queries), y[0])
    # Its penalty is rotation-invariant: with fewer examples than features, their span is all there is to fit.
    basis = np.linalg.qr(x.T)[0]
    enough = np.bincount(y)[np.unique(y)].min() >= FOLDS
    options = {"max_iter": 1000}
    model = LogisticRegression(C=FEW, **options)
    if enough:
        search = {"Cs": STRENGTHS, "cv": FOLDS, "scoring": "accuracy", "l1_ratios": (0.0,)}
        model = LogisticRegressionCV(**search, use_legacy_attributes=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x @ basis, y).predict(queries @ basis)


METHODS = {
    "nearest mean": lambda *task: nearest_mean(*task, cosine=False),
    "nearest mean, cosine": lambda *task: nearest_mean(*task, cosine=True),
    "logistic regression": logistic_regression,
}


def baseline_accuracies(tasks: list[tuple], counts: list[int], file: Path) -> dict[str, list[list[float]]]:
    """method -> (tasks, counts); read from `file` if it is there."""
    if not file.exists():
        with threadpool_limits(1):  # fits are small: more threads wait for each other
            rows = [_of_task(corpus, task, counts) for corpus, task in tqdm(tasks, file.stem)]
        found = {method: [row[method] for row in rows] for method in METHODS}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(found) + "\n")
        temporary.replace(file)
    return json.loads(file.read_text())


def _of_task(corpus: Corpus, task: tuple, counts: list[int]) -> dict[str, list[float]]:
    rows, said, asked, targets = task
    x, queries = corpus.features[rows].numpy(), corpus.features[asked].numpy()
    sizes = [n * CHUNK for n in counts]
    return {
        method: [float((predict(x[:s], said[:s], queries) == targets).mean()) for s in sizes]
        for method, predict in METHODS.items()
    }
