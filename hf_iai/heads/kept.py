"""Slots that hold single tokens unchanged: the latest tokens, and those at and right after the largest surprises.

The surprisal of a token is -log p(token | tokens before it), in nats.
"""

import torch
from torch import Tensor

KEPT = ("kept_key", "kept_value", "kept_trace", "kept_age")  # the token axis of each is the last but one
NEVER = 2**31  # the age of an empty slot
# These four were chosen on the validation packages of examples/research/documents/code_curve.py with the embedded base.
# Other values may suit other text better.
MOST_SURPRISAL = 4.0  # nats; larger surprisals count as this, so that age decides between them
TRACE = 8  # number of tokens over which a surprise still counts, half as much at each
FORGETTING = 0.005  # nats that a token's score loses per token read after it
LATEST = 0.25  # share of the slots that always hold the latest tokens


def trace(surprisal: Tensor) -> Tensor:  # (B, C) in nats -> (B, C)
    """Smooth the surprisal over the tokens that follow: `sum_j 2^-(j + 1) min(surprisal[t - j], 4)`, j = 0..7.

    Tokens right after a surprise are not surprising themselves, but they are needed to copy what followed it. Each
    chunk starts without a trace of the chunk before it.
    """
    before = torch.nn.functional.pad(surprisal.clamp_max(MOST_SURPRISAL), (TRACE - 1, 0))
    weights = 0.5 ** torch.arange(TRACE, 0, -1, device=surprisal.device, dtype=surprisal.dtype)
    return (before.unfold(-1, TRACE, 1) * weights).sum(-1)


def keep_tokens(tokens: dict[str, Tensor], num_kept: int) -> dict[str, Tensor]:
    """Choose the K tokens to keep: the latest K / 4, and among the others those with the highest score

        trace of the surprisal - 0.005 age

    Tokens that the base predicted well tell a query little new, and draw attention away from the tokens that do. All
    tokens age at the same rate, so choosing first within two texts and then among the chosen gives the same result as
    choosing among all their tokens.

    Args:
        tokens: `kept_key` and `kept_value` (B, L, H, T, D), keys at position 0; `kept_trace` (B, 1, 1, T, 1) in nats;
            `kept_age` (B, 1, 1, T, 1), the number of real tokens after this one, or `NEVER` for an empty place. T must
            be at least K.
        num_kept: K.

    Returns:
        The same tensors with T = K, the oldest token first.
    """
    age = tokens["kept_age"]
    score = tokens["kept_trace"] - FORGETTING * age
    score = torch.where(age < LATEST * num_kept, torch.inf, score)
    chosen = score.topk(num_kept, -2).indices  # (B, 1, 1, K, 1)
    oldest_first = age.take_along_dim(chosen, -2).argsort(dim=-2, descending=True, stable=True)
    chosen = chosen.take_along_dim(oldest_first, -2)
    return {name: t.take_along_dim(chosen, -2) for name, t in tokens.items()}


def followed_by(kept: dict[str, Tensor], later: dict[str, Tensor], num_later: Tensor) -> dict[str, Tensor]:
    """Combine the tokens kept of a text with those kept of a later text.

    Args:
        kept: the K tokens kept of the earlier text; see `keep_tokens`.
        later: the tokens kept of the later text.
        num_later: number of tokens of the later text, (B,).
    """
    age = kept["kept_age"]
    aged = kept | {"kept_age": (age + num_later.view(-1, 1, 1, 1, 1)).where(age < NEVER, NEVER)}
    return keep_tokens({name: torch.cat([aged[name], later[name]], -2) for name in KEPT}, age.shape[-2])
