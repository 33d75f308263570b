"""Small helpers for tensors and layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from torch import Tensor, nn

NO_LOSS = -100  # a label with this value takes no part in the loss, as in transformers and PyTorch


def zero_linear(width_in: int, width_out: int) -> nn.Linear:
    """A linear layer whose weight and bias start at zero, so that it outputs zeros until it is trained.

    The layer is initialised as usual before it is set to zero. It therefore uses up as many random numbers as any
    other linear layer, and the layers made after it start the same.

    Args:
        width_in: input features.
        width_out: output features.

    Example:
        >>> import torch
        >>> zero_linear(3, 2)(torch.ones(1, 3)).tolist()
        [[0.0, 0.0]]
    """
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def clamp_with_gradient(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """`x.clamp(low, high)` in the forward pass, the identity in the backward pass (a straight-through clamp).

    The gradient is 1 beyond the bounds too, so a learned parameter that left the allowed range can come back.

    Example:
        >>> import torch
        >>> x = torch.tensor([-2.0, 0.5], requires_grad=True)
        >>> y = clamp_with_gradient(x, low=0)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 0.5], [1.0, 1.0])
    """
    return x + (x.clamp(low, high) - x).detach()


def pad_to(tensor: Tensor, size: Sequence[int], value: float) -> Tensor:
    """Pad the last axes of a tensor at their ends.

    Args:
        tensor: any shape (..., *old_size).
        size: the new lengths of its last `len(size)` axes, none of them shorter than now.
        value: what the new places hold.

    Example:
        >>> import torch
        >>> pad_to(torch.ones(1, 1, 2), [2, 3], value=0).tolist()
        [[[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]
    """
    room = [new - old for new, old in zip(size, tensor.shape[-len(size) :], strict=True)]
    return nn.functional.pad(tensor, [pad for more in reversed(room) for pad in (0, more)], value=value)


def as_precise(moved: Tensor, before: Tensor) -> Tensor:
    """What was moved or cast: the tensor as it was before, on the new device, if a cast would lose precision."""
    lossy = before.is_floating_point() and moved.dtype.itemsize < before.dtype.itemsize
    return before.to(moved.device) if lossy else moved


def recordable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: autograd cannot record such a tensor itself."""
    return tensor.clone() if tensor.is_inference() else tensor


_freezing = Lock()
_frozen: dict[nn.Module, tuple[int, bool]] = {}  # how many contexts a module is in, and the mode it had before


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules and all their submodules in eval mode; afterwards each submodule gets its own mode back.

    Threads may be in such contexts of one module at the same time: it is in eval mode until the last one leaves.

    Args:
        modules: any number of modules.

    Example:
        >>> layer = nn.Dropout()
        >>> with eval_mode(layer):
        ...     print(layer.training)
        False
        >>> layer.training
        True
    """
    parts = [part for module in modules for part in module.modules()]
    with _freezing:
        for part in parts:
            count, training = _frozen.get(part, (0, part.training))
            _frozen[part] = count + 1, training
            part.training = False
    try:
        yield
    finally:
        with _freezing:
            for part in parts:
                count, training = _frozen.pop(part)
                if count > 1:
                    _frozen[part] = count - 1, training
                else:
                    part.training = training


def along(row: Tensor, other: Tensor) -> Tensor:  # (B,), (B, ...) -> (B, 1, ...)
    """A number for each task, in a shape that goes with a tensor of the tasks."""
    return row.view(-1, *[1] * (other.dim() - 1))
