"""A linear classifier's sums: not in front of a text, but behind its features."""

from torch import Tensor, nn

from ..heads import ClassRows


class LinearState(nn.Module):
    """State tensors of C classes in float32: `count` (B, C), `total` and `correction` (B, C, d), `moment` (B, d, d).

    Weighted numbers of examples and sums of features of each class, the sum of x x' over all examples, and the learned
    correction of each class's row; see `heads.ClassRows`. theta(0) is nothing read: all 0, and none of it is learned.

    Args:
        width: d, of the features.
    """

    num_slots_in_front = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.start = nn.ParameterDict()

    def initial(self, batch_size: int, device) -> dict[str, Tensor]:
        """Without a class."""
        return ClassRows.initial(batch_size, 0, self.width, device)
