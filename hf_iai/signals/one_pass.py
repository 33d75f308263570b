"""Reading a chunk in one pass: its keys and values, what was attended to, and the gradient of its loss.

Axes: B tasks, C tokens of a chunk, m slots, L layers, H key/value heads, D head width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases.base import LOGITS_AT_ONCE, Base
from ..bases.compat import AttentionReceived, check_unsharded, inner_backward, key_value_shape
from ..bases.places import positions_of, without_first
from ..bases.prefixes import Prefix
from ..tensors import NO_LOSS, recordable

Tensors = dict[str, Tensor]
_losses_of_reading: ContextVar[list["LossOfReading"] | None] = ContextVar("losses_of_reading", default=None)


@dataclass
class LossOfReading:
    """The loss of a chunk of each task before it was learned from, summed over the tasks that have labels in it."""

    total: Tensor  # (), differentiable
    num_tasks: Tensor  # ()


@contextmanager
def losses_of_reading() -> Iterator[list[LossOfReading]]:
    """A context in which the loss of every chunk that is read can be differentiated. Yields the list of these losses.

    A chunk's loss, before it is learned from, is that of the next chunk under the state before. Its gradient with
    respect to the fast weights is what the chunk is written by, so training costs no more than reading, and no pass is
    kept until the end. Keys and values are constants: nothing is learned through what the slots hold.
    """
    found: list[LossOfReading] = []
    token = _losses_of_reading.set(found)
    try:
        yield found
    finally:
        _losses_of_reading.reset(token)


@dataclass
class OnePass:
    """The results of one pass over [slots][chunk]."""

    key: Tensor  # (B, L, H, C, D) of the chunk, at position 0; 0 for padding
    value: Tensor  # (B, L, H, C, D)
    received: Tensor | None  # (B, L, H, m + C) attention that slots and chunk received; None if it was not asked for
    loss: Tensor  # (B,) mean of -log p(label) over the labelled tokens, in nats; 0 without labels
    surprisal: Tensor  # (B, C) -log p(token | slots, tokens before it) in nats; 0 for the first token and padding
    gradient: Tensors  # of each task's loss with respect to `theta`
    of_reading: LossOfReading | None = None  # inside `losses_of_reading`


def record_loss(reading: OnePass) -> None:
    """Add the loss of a pass to the list of `losses_of_reading`, if the pass was made inside."""
    found = _losses_of_reading.get()
    if found is not None and reading.of_reading is not None:
        found.append(reading.of_reading)


def read_in_one_pass(
    base: Base,
    under: Callable[[Tensors], AbstractContextManager[Prefix]],
    theta: Tensors,  # (B, ...) each
    chunk: tuple[Tensor, Tensor, Tensor],  # ids, mask and labels, (B, C) each
    *,
    attention: bool,
    learned: Callable[[], Iterable[Tensor]] = tuple,
) -> OnePass:
    """Read a chunk behind the slots of a state.

    The loss of a task is that of `read_gradients`: the mean of -log p(label) over its labelled tokens, in nats. The
    gradient is a constant. Keys and values can be differentiated, where torch records gradients.

    Args:
        base: the pretrained model.
        under: `under(theta)` is a context in which the base reads texts, behind the prefix that it yields.
        theta: the tensors to differentiate with respect to; none, for no gradient.
        chunk: token ids; 1 for real tokens; and token ids or -100 where no loss is taken.
        attention: whether to record what is attended to.
        learned: gives other tensors that the loss can be differentiated with respect to inside `losses_of_reading`.

    Raises:
        ValueError: if the base cannot be differentiated, or FSDP shards it inside `losses_of_reading`.
    """
    if theta:
        base.check_differentiable()
    ids, mask, labels = map(recordable, chunk)
    # A row that is all padding would attend to nothing, so it is read as text. It has no labels.
    seen = mask.masked_fill((mask == 0).all(1, keepdim=True), 1)
    of_reading = bool(theta) and _losses_of_reading.get() is not None
    outer = torch.is_grad_enabled() and not of_reading
    if of_reading:
        check_unsharded(base.model, "scored_states='next'")
    others = [t for t in learned() if t.requires_grad] if of_reading else []
    with torch.inference_mode(False), torch.set_grad_enabled(outer or bool(theta)):
        leaves = {
            n: t if outer and t.requires_grad else recordable(t).detach().requires_grad_() for n, t in theta.items()
        }
        with under(leaves) as prefix:
            recording = AttentionReceived(seen, key_value_shape(base.config)[1]) if attention else nullcontext()
            positions = positions_of(seen) + base.next_position(prefix, len(ids))
            with recording:
                hidden, keys_values = base.read(prefix, base.embed(ids), seen, positions, record=ids.shape[1])
            losses = _losses(base, hidden, torch.where(labels == NO_LOSS, ids, labels))
        loss = _mean(losses, labels, mask)
        gradient, of_others = _gradient(base, loss, leaves, others, keep=outer)
    received = recording.check_complete(len(keys_values), base.config._attn_implementation) if attention else None
    keys, values = (torch.stack(t, 1).float() for t in zip(*keys_values, strict=True))
    real = mask[:, None, None, :, None] != 0
    keys, values = (t if outer else t.detach() for t in (base.rotate(keys, -positions), values))
    surprisal = losses.detach().masked_fill(without_first(mask, mask) <= 0, 0)
    found = OnePass(keys.where(real, 0), values.where(real, 0), received, loss.detach(), surprisal, gradient)
    if of_reading:
        pairs = [*((theta[name], g) for name, g in gradient.items()), *zip(others, of_others, strict=True)]
        found.of_reading = LossOfReading(
            _with_gradient(loss.detach().sum(), pairs), _counted(labels, mask).any(1).sum()
        )
    return found


def _losses(base: Base, hidden: Tensor, targets: Tensor) -> Tensor:  # (B, C, d), (B, C) -> (B, C)
    """-log p of every target but the first, which has 0."""
    rows, states, targets = len(targets), hidden[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
    parts = zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    losses = [nn.functional.cross_entropy(base.logits(h), t, reduction="none") for h, t in parts]
    return nn.functional.pad(torch.cat(losses).view(rows, -1), (1, 0))


def _mean(losses: Tensor, labels: Tensor, mask: Tensor) -> Tensor:  # (B, C) each -> (B,)
    counted = _counted(labels, mask)
    return losses.where(counted, 0).sum(1) / counted.sum(1).clamp_min(1)


def _counted(labels: Tensor, mask: Tensor) -> Tensor:  # (B, C) each -> (B, C)
    return without_first(labels.masked_fill(mask == 0, NO_LOSS), mask) != NO_LOSS


def _gradient(
    base: Base, loss: Tensor, theta: Tensors, others: list[Tensor], *, keep: bool
) -> tuple[Tensors, list[Tensor | None]]:
    """The gradient of the summed loss (B,) with respect to `theta`, and to each of `others` that it depends on."""
    if not theta:
        return {}, []
    with inner_backward(base.model):
        found = torch.autograd.grad(
            loss.sum(), [*theta.values(), *others], retain_graph=keep, allow_unused=bool(others)
        )
    return dict(zip(theta, found, strict=False)), list(found[len(theta) :])


def _with_gradient(value: Tensor, pairs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The value, whose gradient with respect to each tensor is the given one."""
    return value + sum((g * (t - t.detach())).sum() for t, g in pairs if g is not None)
