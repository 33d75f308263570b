"""Baselines that fit a linear classifier to random features of all examples read so far.

Axes: S examples read, Q queries, d features, C classes.
"""

import numpy as np

from .extras import require_extra

WIDTH = 2000  # random features
# For features of unit length, chosen on one draw of 5, 20 and 50 examples of each of CLINC's and HWU's intents.
GAMMA, SHRINKAGE = 0.5, 3e-4
PENALTIES = np.logspace(-1, 3, 9)


def kernel_discriminant(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """KLDA: a discriminant whose classes share a covariance, on random features of an RBF kernel.

    With features phi, class means m_c and the covariance S within classes, the class of a query is

        argmax_c m_c' (S + 3e-4 I)^-1 phi - m_c' (S + 3e-4 I)^-1 m_c / 2

    Source: Momeni, Mazumder and Liu, Continual Learning Using a Kernel-Based Method over Foundation Models,
    arXiv 2412.15571. Classes weigh alike; the shrinkage is ours.
    """
    sampler = require_extra("sklearn.kernel_approximation", "baselines").RBFSampler
    map_ = sampler(gamma=GAMMA, n_components=WIDTH, random_state=0).fit(x)
    phi, asked = map_.transform(x), map_.transform(queries)  # (S, D), (Q, D)
    classes, index, count = np.unique(y, return_inverse=True, return_counts=True)
    means = np.zeros((len(classes), WIDTH))
    np.add.at(means, index, phi)
    means /= count[:, None]
    within = phi - means[index]
    rows = np.linalg.solve(within.T @ within / len(x) + SHRINKAGE * np.eye(WIDTH), means.T).T
    return classes[(asked @ rows.T - 0.5 * (rows * means).sum(1)).argmax(1)]


def random_ridge(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """RanPAC's classifier: ridge regression of one-hot labels on 2000 random features max(0, x' w).

    The penalty, of nine from 0.1 to 1000, is chosen by leaving single examples out.

    Source: McDonnell et al., RanPAC: Random Projections and Pre-trained Models for Continual Learning, arXiv
    2307.02251, which has 10,000 features and chooses the penalty on a part of the examples.
    """
    linear = require_extra("sklearn.linear_model", "baselines")
    if len(np.unique(y)) == 1:
        return np.full(len(queries), y[0])
    project = np.random.default_rng(0).standard_normal((x.shape[1], WIDTH))
    model = linear.RidgeClassifierCV(PENALTIES, fit_intercept=False)
    return model.fit(np.maximum(x @ project, 0), y).predict(np.maximum(queries @ project, 0))
