"""Baselines for classifiers: they are fitted to all labelled features read so far.

Axes: S examples read, Q queries, d features, C classes. Labels are integers. A classifier answers with one of the
labels that it was given.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .extras import require_extra
from .random_features import kernel_discriminant, random_ridge

Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (S, d), (S,), (Q, d) -> (Q,)
FOLDS, STRENGTHS, FEW = 3, (0.1, 1.0, 10.0, 100.0), 10.0  # values of C: for cross-validation, and without it
NEIGHBOURS = 5
# For features of unit length: the best of six rates (1 .. 300 and 0.003 .. 1) after 1, 5 and 20 chunks, on 12 intent
# tasks that no reported number is measured on.
SGD_RATE, ADAM_RATE, CHUNK, SWEEPS = 30.0, 0.1, 20, 5


def nearest_class_mean(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The class with the nearest mean, by Euclidean distance."""
    classes, index = np.unique(y, return_inverse=True)
    means = np.zeros((len(classes), x.shape[1]))
    np.add.at(means, index, x)
    means /= np.bincount(index)[:, None]
    return classes[(queries @ means.T - 0.5 * np.square(means).sum(1)).argmax(1)]


def nearest_neighbours(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The majority class of the 5 nearest examples, weighted by the inverse of their distance."""
    neighbours = require_extra("sklearn.neighbors", "baselines")
    model = neighbours.KNeighborsClassifier(min(NEIGHBOURS, len(x)), weights="distance")
    return model.fit(x, y).predict(queries)


def logistic_regression(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Logistic regression on all examples. C is 10, or cross-validated (3 folds) if every class has 3 examples."""
    classes, probabilities = logistic_probabilities(x, y, queries)
    return classes[probabilities.argmax(1)]


def logistic_probabilities(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes (C,) and the probabilities (Q, C) that `logistic_regression` gives them."""
    linear = require_extra("sklearn.linear_model", "baselines")
    if len(np.unique(y)) == 1:
        return np.unique(y), np.ones((len(queries), 1))
    # The penalty does not change under rotation, so fitting in the span of the examples gives the same result faster.
    basis = np.linalg.qr(x.T)[0]
    model = linear.LogisticRegression(C=FEW, max_iter=1000)
    if np.bincount(y)[np.unique(y)].min() >= FOLDS:
        search = {"Cs": STRENGTHS, "cv": FOLDS, "scoring": "accuracy", "l1_ratios": (0.0,)}
        model = linear.LogisticRegressionCV(**search, use_legacy_attributes=False, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", require_extra("sklearn.exceptions", "baselines").ConvergenceWarning)
        model.fit(x @ basis, y)
    return model.classes_, model.predict_proba(queries @ basis)


def sgd_rows(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """A linear classifier that SGD trains chunk by chunk, without keeping examples."""
    return _descended(x, y, queries, lambda rows: torch.optim.SGD(rows, SGD_RATE))


def adam_rows(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """A linear classifier that Adam trains chunk by chunk, without keeping examples."""
    return _descended(x, y, queries, lambda rows: torch.optim.Adam(rows, ADAM_RATE))


def _descended(
    x: np.ndarray, y: np.ndarray, queries: np.ndarray, make: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> np.ndarray:
    """Five steps on each chunk of 20 examples, in order. Rows and biases start at 0."""
    classes, index = np.unique(y, return_inverse=True)
    x, labels = torch.from_numpy(x).float(), torch.from_numpy(index)
    rows, bias = x.new_zeros(len(classes), x.shape[1]), x.new_zeros(len(classes))
    optimizer = make([rows.requires_grad_(), bias.requires_grad_()])
    with torch.enable_grad():
        for chunk, said in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
            for _ in range(SWEEPS):
                optimizer.zero_grad()
                nn.functional.cross_entropy(chunk @ rows.T + bias, said).backward()
                optimizer.step()
    scores = torch.from_numpy(queries).float() @ rows.detach().T + bias.detach()
    return classes[scores.argmax(1).numpy()]


CLASSIFIERS: dict[str, Classifier] = {
    "nearest_class_mean": nearest_class_mean,
    "nearest_neighbours": nearest_neighbours,
    "logistic_regression": logistic_regression,
    "kernel_discriminant": kernel_discriminant,
    "random_ridge": random_ridge,
    "sgd_rows": sgd_rows,
    "adam_rows": adam_rows,
}
