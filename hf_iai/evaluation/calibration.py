"""How far a classifier's probabilities can be trusted."""

import numpy as np


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, num_bins: int = 15) -> float:
    """The mean distance between confidence and accuracy, over bins of equal width of the largest probability:

        ECE = sum_k |bin k| / Q |accuracy(bin k) - mean confidence(bin k)|

    Args:
        probabilities: (Q, C).
        targets: class numbers, (Q,).

    Example:
        >>> expected_calibration_error(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1]))
        0.3

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, equation 3.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    places = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=num_bins)
    return round(float(np.abs(gaps).sum() / len(targets)), 12)
