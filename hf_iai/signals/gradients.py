"""The signal `gradients`: how the loss of a chunk changes with the state."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..bases.base import Base, without_first
from ..bases.compat import check_double_backward, inner_backward, math_attention


def read_gradients(
    base: Base,
    state: nn.Module,  # of `hf_iai.states`
    tensors: dict[str, Tensor],  # (B, ...) each
    ids: Tensor,  # (B, C)
    mask: Tensor,  # (B, C)
    labels: Tensor,  # (B, C)
    *,
    second_order: bool,
) -> dict[str, Tensor]:
    """d loss / d tensors of each task, where its loss is the mean of -log p(label) over its labelled tokens, in nats.

    The first token of a chunk is not predicted. A row without labels has a gradient of zero. The sum over rows is
    differentiated, so that no row's gradient depends on the others. First order: a constant. Second order: a function
    of the tensors and of the predictor's weights, where gradients are being recorded at all.

    Raises:
        ValueError: for `second_order` with an attention or a sharding that cannot be differentiated twice.
    """
    twice = second_order and torch.is_grad_enabled()
    if twice:
        check_double_backward(base.model)

    def losses(tensors: dict[str, Tensor], ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        with state.under(base, tensors) as prefix:
            return _losses(base, prefix, ids, mask, labels)

    with math_attention(twice):
        chunk, backward = (ids, mask, labels), inner_backward(base.model)
        return gradients_of(losses, tensors, chunk, second_order=second_order, around_backward=backward)


def gradients_of(
    losses: Callable[..., Tensor],  # (tensors, *chunk) -> (B,)
    tensors: dict[str, Tensor],  # (B, ...) each
    chunk: tuple[Tensor, ...],
    *,
    second_order: bool,
    around_backward: AbstractContextManager = nullcontext(),  # noqa: B008
) -> dict[str, Tensor]:
    """d sum(losses) / d tensors, also where no gradient is being recorded; see `read_gradients`."""
    twice = second_order and torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        tensors = {
            n: t if twice and t.requires_grad else _usable(t).detach().requires_grad_() for n, t in tensors.items()
        }
        loss = losses(tensors, *map(_usable, chunk)).sum()
        with around_backward:
            gradients = torch.autograd.grad(loss, list(tensors.values()), create_graph=twice)
    return dict(zip(tensors, gradients, strict=True))


def _losses(base: Base, prefix, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:  # (B, C) each -> (B,)
    labels = without_first(labels.masked_fill(mask == 0, -100), mask)[:, 1:]
    # A row of padding alone would attend to nothing: it is read as text, and has no labels.
    mask = mask.masked_fill((mask == 0).all(1, keepdim=True), 1)
    logits = base.answer(prefix, ids, mask).logits[:, :-1]  # (B, C - 1, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")  # 0 where there is no label
    return losses.sum(1) / (labels != -100).sum(1).clamp_min(1)


def _usable(tensor: Tensor) -> Tensor:
    """What was made in inference mode cannot be recorded, but a copy of it can."""
    return tensor.clone() if tensor.is_inference() else tensor
