"""A linear model's sums: not in front of a text, but behind its features."""

from torch import nn


class LinearState(nn.Module):
    """State tensors that `heads.ClassRows` and `heads.GaussianRows` make rows of.

    Of C classes, in float32, `count` (B, C), `total` and `correction` (B, C, d), `moment` (B, d, d): weighted numbers
    of examples and sums of features of each class, the sum of x x' over all examples, and the learned correction of
    each class's row times its number of examples. Of a regression with o outputs, in float64, `count` (B,), `total`
    (B, d), `moment` (B, d, d), `target` and `square` (B, o), `cross` (B, o, d): n, sum x, sum x x', sum y, sum y^2 and
    sum y x'. theta(0) is nothing read: all 0, and none of it is learned.

    Args:
        width: d, of the features.
    """

    num_slots_in_front = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.start = nn.ParameterDict()
