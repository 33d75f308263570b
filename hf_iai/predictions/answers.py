"""What may be answered: any tokens in so many slots, or one of a set of labels.

Axes: N queries, S slots, V vocabulary, C labels of at most L tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ..bases.base import Base
from .queries import NO_TARGET, Queries

ABSENT = -1e4  # the log probability of a label that a task does not have


class Answers(ABC):
    """What can be answered, how it is fed back, and what hidden states say of it; S = 1 slot by default."""

    num_slots = 1
    depends_on_itself = False  # whether what the base says of it changes with the current prediction

    @property
    def length(self) -> int:
        """The most places that an answer takes behind a query."""
        return self.num_slots

    @abstractmethod
    def embedded(self, base: Base, logits: Tensor) -> Tensor:  # (N, S, V) -> (N, S, d)
        """The current prediction as the slots hold it: the expected embedding."""

    @abstractmethod
    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, S, d) -> (N, S, V)
        """What the slots' last hidden states say."""

    @abstractmethod
    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        """(N, S, V), what the hidden states (N, S, d) before the slots say of them."""

    def refined(self, logits: Tensor, said: Tensor, prior: Tensor, weight: Tensor, correction: Tensor) -> Tensor:
        """The logits (N, S, V) after one more chunk: a product of experts, and a correction.

        Args:
            said, prior: log probabilities (N, S, V) behind the chunk and without one.
            weight: of the chunk, (N, S, 1).
            correction: (N, S, V), or 0.
        """
        return logits + weight * (said - prior) + correction

    def output(self, logits: Tensor) -> Tensor:  # (N, S, V)
        """As a caller sees it: (N, V), since there is one slot."""
        return logits.squeeze(1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:  # (N, S, V), (N, S)
        """The mean cross-entropy of targets that are not -100; 0 without any."""
        total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (targets != NO_TARGET).sum().clamp_min(1)


@dataclass(frozen=True)
class FreeAnswer(Answers):
    """Any A = S tokens. Token a is predicted behind the *current prediction* of those before it, not behind them."""

    num_slots: int

    @property
    def depends_on_itself(self) -> bool:
        return self.num_slots > 1

    def embedded(self, base: Base, logits: Tensor) -> Tensor:  # (N, A, V) -> (N, A, d)
        return base.expected_embedding(logits.softmax(-1))

    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, A, d) -> (N, A, V)
        return base.logits(hidden)

    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        return base.logits(hidden).log_softmax(-1)

    def output(self, logits: Tensor) -> Tensor:  # (N, A, V)
        return logits

    def targets(self, answers: Tensor) -> Tensor:  # (N, A) -> (N, A)
        return answers


@dataclass(frozen=True)
class LabelSet(Answers):
    """One of C labels, each of any number of tokens; the one slot, S = 1, holds all of a label.

    log p(label) is the sum over its tokens, each behind those before it.
    """

    ids: Tensor  # (N, C, L)
    mask: Tensor  # (N, C, L)

    @property
    def length(self) -> int:
        return self.ids.shape[2]

    @property
    def single_tokens(self) -> bool:
        return self.ids.shape[2] == 1

    def embedded(self, base: Base, logits: Tensor) -> Tensor:  # (N, 1, C) -> (N, 1, d)
        """The expected label, each the mean of its tokens' embeddings."""
        each = (base.embed(self.ids) * self._shares.unsqueeze(-1)).sum(2)  # (N, C, d)
        return logits.softmax(-1).to(each.dtype) @ each

    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, 1, d) -> (N, 1, C)
        """The mean over a label's tokens."""
        picked = base.logits(hidden).gather(2, self.ids.flatten(1).unsqueeze(1)).unflatten(2, self.ids.shape[1:])
        return (picked * self._shares.unsqueeze(1)).sum(-1)

    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        """(N, 1, C); single tokens of the hidden state (N, 1, d) that predicts the slot, others in a pass of theirs."""
        if self.single_tokens:
            found = base.logits(hidden).log_softmax(-1).gather(2, self.ids.mT)
        else:
            _, num_labels, length = self.ids.shape
            ids, mask = self.ids.flatten(0, 1), self.mask.flatten(0, 1)  # (N * C, L)
            hidden, _ = queries.repeated(num_labels).followed_by(base, chunk, base.embed(ids), mask)
            each = base.logits(hidden).log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)
            found = (each * mask).sum(1).view(-1, 1, num_labels)
        return found.masked_fill(~self.mask.any(-1).unsqueeze(1), ABSENT)

    def targets(self, answers: Tensor) -> Tensor:  # (N, A) -> (N, 1)
        """Which label each answer is; -100 for a query without an answer.

        Raises:
            ValueError: for an answer that is none of its task's labels.
        """
        length = max(answers.shape[1], self.ids.shape[2])
        labels = _padded(self.ids.masked_fill(self.mask == 0, NO_TARGET), length)
        same = (labels == _padded(answers, length).unsqueeze(1)).all(-1)  # (N, C)
        unasked = (answers == NO_TARGET).all(1)
        if not (same.any(1) | unasked).all():
            row = int((~(same.any(1) | unasked)).nonzero()[0])
            raise ValueError(
                f"the answer of query {row} is tokens {answers[row][answers[row] != NO_TARGET].tolist()}, none of its "
                f"labels {_lists(self.ids[row], self.mask[row])}: tokenise both alike, the end of sequence included"
            )
        return same.long().argmax(1).masked_fill(unasked, NO_TARGET).unsqueeze(1)

    @property
    def _shares(self) -> Tensor:  # (N, C, L)
        return self.mask / self.mask.sum(-1, keepdim=True).clamp_min(1)


def label_tensors(labels: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of C labels, as ids and mask (1, C, L).

    Raises:
        ValueError: for fewer than two labels, one without a token, or two that are alike.
    """
    labels = [[int(token) for token in label] for label in labels]
    if len(labels) < 2 or not all(labels) or len({*map(tuple, labels)}) < len(labels):
        raise ValueError(
            "labels must be two or more lists of token ids, none of them empty and no two alike, got "
            f"{labels}: pass tokenizer([...], add_special_tokens=False)['input_ids']"
        )
    longest = max(map(len, labels))
    ids = torch.tensor([label + [0] * (longest - len(label)) for label in labels], device=device)
    mask = torch.tensor([[1] * len(label) + [0] * (longest - len(label)) for label in labels], device=device)
    return ids.unsqueeze(0), mask.unsqueeze(0)


def _padded(tokens: Tensor, length: int) -> Tensor:
    return pad(tokens, (0, length - tokens.shape[-1]), value=NO_TARGET)


def _lists(ids: Tensor, mask: Tensor) -> list[list[int]]:  # (C, L) each
    return [row[keep != 0].tolist() for row, keep in zip(ids, mask, strict=True)]
