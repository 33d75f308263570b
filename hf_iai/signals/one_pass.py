"""Reading a chunk in one pass: its keys and values, what was attended to, and the gradient of its loss.

Axes: B tasks, C tokens of a chunk, m slots, L layers, H key/value heads, D head width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases.base import LOGITS_AT_ONCE, Base
from ..bases.compat import AttentionReceived, inner_backward, key_value_shape
from ..bases.places import positions_of, without_first
from ..bases.prefixes import Prefix
from ..tensors import NO_LOSS, recordable

Tensors = dict[str, Tensor]


@dataclass
class OnePass:
    """The results of one pass over [slots][chunk]."""

    key: Tensor  # (B, L, H, C, D) of the chunk, at position 0; 0 for padding
    value: Tensor  # (B, L, H, C, D)
    received: Tensor | None  # (B, L, H, m + C) attention that slots and chunk received; None if it was not asked for
    loss: Tensor  # (B,) mean of -log p(label) over the labelled tokens, in nats; 0 without labels
    surprisal: Tensor  # (B, C) -log p(token | slots, tokens before it) in nats; 0 for the first token and padding
    gradient: Tensors  # of each task's loss with respect to `theta`


def read_in_one_pass(
    base: Base,
    under: Callable[[Tensors], AbstractContextManager[Prefix]],
    theta: Tensors,  # (B, ...) each
    chunk: tuple[Tensor, Tensor, Tensor],  # ids, mask and labels, (B, C) each
    *,
    attention: bool,
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
    """
    if theta:
        base.check_differentiable()
    ids, mask, labels = map(recordable, chunk)
    # A row that is all padding would attend to nothing, so it is read as text. It has no labels.
    seen = mask.masked_fill((mask == 0).all(1, keepdim=True), 1)
    outer = torch.is_grad_enabled()
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
        gradient = _gradient(base, loss, leaves, keep=outer)
    received = recording.check_complete(len(keys_values), base.config._attn_implementation) if attention else None
    keys, values = (torch.stack(t, 1).float() for t in zip(*keys_values, strict=True))
    real = mask[:, None, None, :, None] != 0
    keys, values = (t if outer else t.detach() for t in (base.rotate(keys, -positions), values))
    surprisal = losses.detach().masked_fill(without_first(mask, mask) <= 0, 0)
    return OnePass(keys.where(real, 0), values.where(real, 0), received, loss.detach(), surprisal, gradient)


def _losses(base: Base, hidden: Tensor, targets: Tensor) -> Tensor:  # (B, C, d), (B, C) -> (B, C)
    """-log p of every target but the first, which has 0."""
    rows, states, targets = len(targets), hidden[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
    parts = zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    losses = [nn.functional.cross_entropy(base.logits(h), t, reduction="none") for h, t in parts]
    return nn.functional.pad(torch.cat(losses).view(rows, -1), (1, 0))


def _mean(losses: Tensor, labels: Tensor, mask: Tensor) -> Tensor:  # (B, C) each -> (B,)
    counted = without_first(labels.masked_fill(mask == 0, NO_LOSS), mask) != NO_LOSS
    return losses.where(counted, 0).sum(1) / counted.sum(1).clamp_min(1)


def _gradient(base: Base, loss: Tensor, theta: Tensors, *, keep: bool) -> Tensors:  # (B,)
    if not theta:
        return {}
    with inner_backward(base.model):
        found = torch.autograd.grad(loss.sum(), list(theta.values()), retain_graph=keep)
    return dict(zip(theta, found, strict=True))
