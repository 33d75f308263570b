"""Losses of query tokens, under a task state or under the bare base.

Axes: B episodes, K chunks of C tokens, Q = 1 query of T tokens, V vocabulary. `EpisodeCollator` makes the batches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.examples import NO_LOSS

Batch = dict[str, Tensor]


def token_losses(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
) -> Tensor:  # (B, T - 1)
    """Negative log-likelihood in nats of tokens 1..T-1, each from the logits before it. NaN if the label is -100.

    Example:
        >>> import torch
        >>> from hf_iai.evaluation import token_losses
        >>> token_losses(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))
        tensor([[1.3863,    nan]])
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=NO_LOSS)
    return losses.masked_fill(targets == NO_LOSS, float("nan"))


def state_losses(model, batch: Batch, num_chunks: int) -> Tensor:  # (B, T - 1)
    """Losses under the state that has read the last `num_chunks` chunks of the batch; `initial_state` if that is 0."""
    query, labels = _query(batch)
    total = batch["chunk_input_ids"].shape[1]
    if num_chunks:
        state = model.adapt(_chunk(batch, k) for k in range(total - num_chunks, total))
    else:
        state = model.initial_state(len(labels))
    return token_losses(model(**query, task_state=state).logits, labels)


def refined_losses(model, batch: Batch, num_chunks: int) -> Tensor:  # (B, T - 1)
    """Losses of the answers in regime implicit, after the last `num_chunks` chunks have refined the predictions.

    The answer of a query are its labelled tokens. Each of several answer tokens is predicted given the prediction of
    the tokens before it, not given these tokens themselves.
    """
    query, labels = _query(batch)
    first = batch["chunk_input_ids"].shape[1] - num_chunks
    chunks = (_chunk(batch, k) for k in range(first, first + num_chunks))
    *_, logits = model.refine(chunks, query | {"labels": labels}, with_start=True)  # (B, A, V)
    answered = labels[:, 1:] != NO_LOSS  # (B, T - 1)
    slots = (answered.cumsum(1) - 1).clamp_min(0)  # for each token, the number of the slot that predicts it
    targets = labels[:, 1:].masked_fill(~answered, 0)
    found = logits.log_softmax(-1)[torch.arange(len(labels), device=labels.device).unsqueeze(1), slots, targets]
    return (-found).masked_fill(~answered, float("nan"))


def bare_base_losses(model, batch: Batch, num_tokens: int) -> Tensor:  # (B, T - 1)
    """Losses of the base without adapter, which sees the last `num_tokens` real tokens of the chunks before the query.

    Rows have no padding on the left, so every token has its own position with any kind of positions.
    """
    query, labels = _query(batch)
    contexts = _last_real_tokens(batch, num_tokens)
    ids = [torch.cat(row) for row in zip(contexts, query["input_ids"], strict=True)]
    mask = [torch.cat([torch.ones_like(c), q]) for c, q in zip(contexts, query["attention_mask"], strict=True)]
    with model.disable_adapter():
        logits = model(input_ids=pad_sequence(ids, True), attention_mask=pad_sequence(mask, True)).logits
    of_query = [row[len(c) : len(c) + labels.shape[1]] for row, c in zip(logits, contexts, strict=True)]
    return token_losses(torch.stack(of_query), labels)


def _query(batch: Batch) -> tuple[Batch, Tensor]:
    query = {name: batch[name][:, 0] for name in ("input_ids", "attention_mask")}
    return query, batch["labels"][:, 0]


def _chunk(batch: Batch, k: int) -> Batch:
    return {name: batch[f"chunk_{name}"][:, k] for name in ("input_ids", "attention_mask", "labels")}


def _last_real_tokens(batch: Batch, num_tokens: int) -> list[Tensor]:  # B of (<= num_tokens,)
    rows = zip(batch["chunk_input_ids"].flatten(1), batch["chunk_attention_mask"].flatten(1).bool(), strict=True)
    real = [ids[mask] for ids, mask in rows]
    return [ids[max(len(ids) - num_tokens, 0) :] for ids in real]
