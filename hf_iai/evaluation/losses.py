"""Loss of every query token, under a task state or under the bare base.

Axes: B episodes, K chunks of C tokens, Q = 1 query of T tokens, V vocabulary. A batch is what `EpisodeCollator` gives.
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
    """Negative log-likelihood in nats of tokens 1..T-1, each from the logits before it; NaN where the label is -100.

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
    """Losses under the state that read the last `num_chunks` chunks of the batch, `initial_state` for none."""
    query, labels = _query(batch)
    total = batch["chunk_input_ids"].shape[1]
    if num_chunks:
        state = model.adapt(_chunk(batch, k) for k in range(total - num_chunks, total))
    else:
        state = model.initial_state(len(labels))
    return token_losses(model(**query, task_state=state).logits, labels)


def refined_losses(model, batch: Batch, num_chunks: int) -> Tensor:  # (B, T - 1)
    """Losses of the answer, in regime implicit, under the prediction that the last `num_chunks` chunks have refined.

    A query's answer are its labelled tokens. Token a of several is predicted behind the prediction of those before it,
    not behind the tokens themselves.
    """
    query, labels = _query(batch)
    first = batch["chunk_input_ids"].shape[1] - num_chunks
    chunks = (_chunk(batch, k) for k in range(first, first + num_chunks))
    *_, logits = model.refine(chunks, query | {"labels": labels}, with_start=True)  # (B, A, V)
    answered = labels[:, 1:] != NO_LOSS  # (B, T - 1)
    slots = (answered.cumsum(1) - 1).clamp_min(0)  # of each token, the one that predicts it
    targets = labels[:, 1:].masked_fill(~answered, 0)
    found = logits.log_softmax(-1)[torch.arange(len(labels), device=labels.device).unsqueeze(1), slots, targets]
    return (-found).masked_fill(~answered, float("nan"))


def bare_base_losses(model, batch: Batch, num_tokens: int) -> Tensor:  # (B, T - 1)
    """Losses of the base without adapter that sees the last `num_tokens` real tokens of the chunks before the query.

    Rows are packed to the left, so that every token stands at its own position whatever kind of positions the base has.
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
