"""Where the tokens of a text stand, whatever padding is around them. Axes: B rows, T tokens."""

from torch import Tensor

from ..tensors import NO_LOSS


def in_order(rows: Tensor, order: Tensor, axis: int = 1) -> Tensor:  # (B, T, ...) or (B, ..., T, ...), (B, T)
    """Reorder the tokens of each row, which are along `axis`."""
    shape = [1] * rows.dim()
    shape[0], shape[axis] = order.shape
    return rows.take_along_dim(order.view(shape), axis)


def positions_of(mask: Tensor) -> Tensor:  # (B, T) -> (B, T)
    """The position of each token, counting real tokens only. So padding on either side changes no position."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def without_first(labels: Tensor, mask: Tensor) -> Tensor:  # (B, T) each
    """Take the label of each row's first real token away: nothing predicts it, even if padding stands before it."""
    return labels.masked_fill(positions_of(mask) == 0, NO_LOSS)


def ages_of(mask: Tensor) -> Tensor:  # (B, T) -> (B, T)
    """The number of real tokens after each token."""
    return mask.flip(1).cumsum(1).flip(1) - mask
