"""The signal `gradients`: the gradient of a chunk's loss with respect to the state."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..bases.base import Base
from ..bases.compat import check_double_backward, inner_backward, math_attention
from ..bases.places import without_first
from ..tensors import NO_LOSS, recordable


def read_gradients(
    base: Base,
    state: nn.Module,  # one of `hf_iai.states`
    tensors: dict[str, Tensor],  # (B, ...) each
    ids: Tensor,  # (B, C)
    mask: Tensor,  # (B, C)
    labels: Tensor,  # (B, C)
    *,
    second_order: bool,
) -> dict[str, Tensor]:
    """The gradient of each task's loss with respect to its tensors.

    The loss of a task is the mean of -log p(label) over its labelled tokens, in nats. The first token of a chunk is not
    predicted. A row without labels has a gradient of zero. The sum over rows is differentiated, so the gradient of a
    row does not depend on the other rows.

    Args:
        base: the pretrained model.
        state: says how the base reads a text under the tensors.
        tensors: the state's tensors of B tasks.
        ids: token ids of the chunk.
        mask: 1 for real tokens, 0 for padding.
        labels: token ids, -100 where no loss is taken.
        second_order: whether the gradient can itself be differentiated, with respect to the tensors and the predictor's
            weights. It has no effect where torch records no gradients. Otherwise the result is a constant.

    Raises:
        ValueError: if `second_order` is set and the attention or the sharding cannot be differentiated twice, or the
            base was made in inference mode.
    """
    base.check_differentiable()
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
    """d sum(losses) / d tensors. It also works under `torch.no_grad` and `torch.inference_mode`.

    Args:
        losses: a function of the tensors and the chunk that gives the loss of each task.
        tensors: the state's tensors of B tasks.
        chunk: the other arguments of `losses`.
        second_order: as in `read_gradients`.
        around_backward: a context in which the backward pass runs.
    """
    twice = second_order and torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        masks = {n: recordable(t) for n, t in tensors.items() if not t.is_floating_point()}
        tensors = {
            n: t if twice and t.requires_grad else recordable(t).detach().requires_grad_()
            for n, t in tensors.items()
            if n not in masks
        }
        loss = losses(tensors | masks, *map(recordable, chunk)).sum()
        with around_backward:
            gradients = torch.autograd.grad(loss, list(tensors.values()), create_graph=twice)
    return dict(zip(tensors, gradients, strict=True))


def _losses(base: Base, prefix, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:  # (B, C) each -> (B,)
    labels = without_first(labels.masked_fill(mask == 0, NO_LOSS), mask)[:, 1:]
    # A row that is all padding would attend to nothing, so it is read as text. It has no labels.
    mask = mask.masked_fill((mask == 0).all(1, keepdim=True), 1)
    logits = base.answer(prefix, ids, mask).logits[:, :-1]  # (B, C - 1, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")  # 0 where there is no label
    return losses.sum(1) / (labels != NO_LOSS).sum(1).clamp_min(1)
