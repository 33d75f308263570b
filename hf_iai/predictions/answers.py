"""The possible answers to a query: any tokens in a given number of slots, or one of a set of labels.

Axes: N queries, S slots, V choices for a slot (the vocabulary or the labels), C labels of at most L tokens, d hidden
width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..bases.base import Base
from ..tensors import NO_LOSS, pad_to
from .queries import Queries

ABSENT = -1e4  # log probability of padding in the set of labels, for tasks with fewer labels than others


class Answers(ABC):
    """The possible answers of queries: how a prediction is embedded, and how hidden states become a prediction.

    An answer fills S slots after the query, one by default.
    """

    num_slots = 1
    depends_on_itself = False  # whether the base's prediction of a slot depends on the current prediction of others

    @property
    def length(self) -> int:
        """The largest number of places that an answer takes after a query."""
        return self.num_slots

    @abstractmethod
    def embedded(self, base: Base, logits: Tensor) -> Tensor:  # (N, S, V) -> (N, S, d)
        """The current prediction as embeddings of the slots: the expected embedding of the answer."""

    @abstractmethod
    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, S, d) -> (N, S, V)
        """Scores of the answers from the last hidden states of the slots themselves."""

    @abstractmethod
    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        """Log probabilities (N, S, V) of the answers from the last hidden states (N, S, d) before the slots.

        Args:
            base: the pretrained model.
            queries: the prompts.
            chunk: what was read before the prompts, as `read_keys_values` gives it, or None.
            hidden: last hidden states at the places that predict the slots.
        """

    def refined(self, logits: Tensor, said: Tensor, prior: Tensor, weight: Tensor, correction: Tensor) -> Tensor:
        """The logits (N, S, V) after one more chunk: a product of experts, plus a correction.

        Args:
            logits: before the chunk, (N, S, V).
            said: log probabilities after reading the chunk, (N, S, V).
            prior: log probabilities without a chunk, (N, S, V).
            weight: weight of the chunk, (N, S, 1).
            correction: (N, S, V), or 0.
        """
        return logits + weight * (said - prior) + correction

    def output(self, logits: Tensor) -> Tensor:  # (N, S, V)
        """The logits that a caller gets: (N, V), since there is one slot."""
        return logits.squeeze(1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:  # (N, S, V), (N, S)
        """The mean cross-entropy over the targets that are not -100; 0 if there are none."""
        total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (targets != NO_LOSS).sum().clamp_min(1)


@dataclass(frozen=True)
class FreeAnswer(Answers):
    """Any sequence of A = S tokens. Token a is predicted given the *current prediction* of the tokens before it.

    Args:
        num_slots: A.
    """

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
    """One of C labels, each of any number of tokens. There is one slot, S = 1, for the whole label.

    log p(label) is the sum of log p(token | tokens before it) over the label's tokens.

    Args:
        ids: token ids of the labels.
        mask: 1 for real tokens, 0 for padding; all 0 for a label that a task does not have.
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
        """The expected embedding of the label. The embedding of a label is the mean over its tokens."""
        each = (base.embed(self.ids) * self._shares.unsqueeze(-1)).sum(2)  # (N, C, d)
        return logits.softmax(-1).to(each.dtype) @ each

    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, 1, d) -> (N, 1, C)
        """The logits of a label's tokens, averaged over the label."""
        picked = base.logits(hidden).gather(2, self.ids.flatten(1).unsqueeze(1)).unflatten(2, self.ids.shape[1:])
        return (picked * self._shares.unsqueeze(1)).sum(-1)

    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        """Log probabilities (N, 1, C) of the labels.

        If all labels are single tokens, the hidden state (N, 1, d) before the slot gives them. Longer labels are read
        in another pass.
        """
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
        """The number of the label that each answer is; -100 for a query without an answer.

        Args:
            answers: token ids of the answers, -100 after their ends.

        Raises:
            ValueError: if an answer is none of its task's labels.
        """
        length = max(answers.shape[1], self.ids.shape[2])
        labels = pad_to(self.ids.masked_fill(self.mask == 0, NO_LOSS), [length], NO_LOSS)
        same = (labels == pad_to(answers, [length], NO_LOSS).unsqueeze(1)).all(-1)  # (N, C)
        unasked = (answers == NO_LOSS).all(1)
        if not (same.any(1) | unasked).all():
            row = int((~(same.any(1) | unasked)).nonzero()[0])
            raise ValueError(
                f"the answer of query {row} is tokens {answers[row][answers[row] != NO_LOSS].tolist()}, none of its "
                f"labels {_lists(self.ids[row], self.mask[row])}: tokenise both alike, the end of sequence included"
            )
        return same.long().argmax(1).masked_fill(unasked, NO_LOSS).unsqueeze(1)

    @property
    def _shares(self) -> Tensor:  # (N, C, L)
        """The weights of a mean over each label's tokens."""
        return self.mask / self.mask.sum(-1, keepdim=True).clamp_min(1)


def label_tensors(labels: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Turn the token ids of C labels into tensors.

    Args:
        labels: a list of token ids for each label.
        device: where to put the tensors.

    Returns:
        ids and mask, (1, C, L) each.

    Raises:
        ValueError: if there are fewer than two labels, a label has no token, or two labels are equal.
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


def _lists(ids: Tensor, mask: Tensor) -> list[list[int]]:  # (C, L) each
    return [row[keep != 0].tolist() for row, keep in zip(ids, mask, strict=True)]
