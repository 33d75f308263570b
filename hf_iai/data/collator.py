"""EpisodeCollator: a batch of episodes as tensors. Axes: B episodes, K chunks of C tokens, Q queries of T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..tensors import NO_LOSS
from .checks import PARTS, check_at_least
from .chunks import split_tokens
from .collator_base import Batch, CollatorBase, stack
from .episodes import check_disjoint_tokens
from .examples import Episode, Tokens, tokenize_example, with_end


@dataclass
class EpisodeCollator(CollatorBase):
    """Turns a list of episodes into what a model's `forward` takes.

    The support examples of an episode are joined and cut into chunks of `chunk_size` tokens, as `chunk_examples` does
    it, with end-of-sequence tokens. Each query stands by itself. The last chunk, the queries, and missing queries are
    padded on the right, with mask 0 and label -100. If an episode has fewer chunks than others, whole chunks of padding
    stand in front, so the last n chunks of the batch are the last n of every episode.

    An episode may have `"labels"`, the set its answers come from, as strings or lists of token ids (regime implicit).

    Args:
        tokenizer: the base model's tokenizer.
        chunk_size: C, tokens per chunk.
        max_chunks: keep only this many chunks per episode, the last ones, right before the query. All by default.

    Returns:
        When called with episodes: `chunk_input_ids`, `chunk_attention_mask`, `chunk_labels` (B, K, C) and
        `input_ids`, `attention_mask`, `labels` (B, Q, T), all long. K is 0 if there is no support, or `max_chunks` is
        0. If the episodes have labels, also `label_input_ids` and `label_attention_mask` (B, L, T) for L labels. Labels
        given as strings end as completions do, with the end-of-sequence token, if there is one.

    Raises:
        ValueError: if `chunk_size` is below 1 or `max_chunks` below 0; if there is no episode; if a row is no episode;
            if an episode has no query, an empty one, one without a label, or one that is also in its support; if only
            some episodes have labels.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import EpisodeCollator
        >>> shot = {"prompt": "1+1=", "completion": "2"}
        >>> query = {"prompt": "1+2=", "completion": "3"}
        >>> collate = EpisodeCollator(ByT5Tokenizer(), chunk_size=4)
        >>> batch = collate([{"support": [shot], "query": [query]}])
        >>> batch["chunk_input_ids"].tolist(), batch["labels"].tolist()
        ([[[52, 46, 52, 64], [53, 1, 0, 0]]], [[[-100, -100, -100, -100, 54, 1]]])
    """

    tokenizer: PreTrainedTokenizerBase
    chunk_size: int
    max_chunks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_chunks is not None:
            check_at_least(0, max_chunks=self.max_chunks)

    def _batch(self, episodes: Sequence[Episode]) -> Batch:
        chunks, queries = zip(*map(self._chunks_and_queries, episodes), strict=True)
        # A place of `stack` is a whole chunk here, so missing ones stand in front with chunk_size=1.
        support = self._stacked(chunks, self.chunk_size, in_front=1)
        batch = {f"chunk_{name}": t for name, t in support.items()} | self._stacked(queries, _longest(queries))
        return batch | self._label_sets(episodes)

    def _label_sets(self, episodes: Sequence[Episode]) -> Batch:
        sets = [episode.get("labels") or [] for episode in episodes]
        if not any(sets):
            return {}
        if not all(sets):
            raise ValueError("some episodes of the batch have labels and others have none: batch them apart")
        tokens = [[self._label_tokens(label) for label in labels] for labels in sets]
        stacked = self._stacked(tokens, _longest(tokens))
        return {f"label_{name}": stacked[name] for name in ("input_ids", "attention_mask")}

    def _label_tokens(self, label: str | list[int]) -> Tokens:
        if not isinstance(label, str):
            return {"input_ids": list(label), "labels": list(label)}
        example = {"text": label}
        return with_end(tokenize_example(example, self.tokenizer), example, self.tokenizer)

    def _chunks_and_queries(self, episode: Episode) -> tuple[list[Tokens], list[Tokens]]:
        support, query = ([tokenize_example(example, self.tokenizer) for example in episode[part]] for part in PARTS)
        for number, tokens in enumerate(query):
            if not tokens["input_ids"]:
                raise ValueError(f"query {number} of an episode has no tokens; leave it out or give it content")
            if all(label == NO_LOSS for label in tokens["labels"]):
                raise ValueError(f"query {number} of an episode has no token with a loss: all its labels are {NO_LOSS}")
        check_disjoint_tokens(support, query, self.tokenizer)
        support, query = (
            [with_end(*pair, self.tokenizer) for pair in zip(tokens, episode[part], strict=True)]
            for part, tokens in zip(PARTS, (support, query), strict=True)
        )
        chunks = list(split_tokens(support, self.chunk_size))
        return chunks if self.max_chunks is None else chunks[max(0, len(chunks) - self.max_chunks) :], query

    def _stacked(self, rows: Sequence[list[Tokens]], width: int, in_front: int | None = None) -> Batch:
        """Stack rows of tokens of B episodes, each row padded to `width`: (B, K, C) or (B, Q, T)."""
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": NO_LOSS}
        parts = []
        for row in rows:
            part = {name: torch.full((len(row), width), value) for name, value in fill.items()}
            for k, tokens in enumerate(row):
                length = len(tokens["input_ids"])
                part["input_ids"][k, :length] = torch.tensor(tokens["input_ids"])
                part["attention_mask"][k, :length] = 1
                part["labels"][k, :length] = torch.tensor(tokens["labels"])
            parts.append(part)
        return stack(parts, fill, in_front)


def _longest(rows: Sequence[list[Tokens]]) -> int:
    return max(len(tokens["input_ids"]) for row in rows for tokens in row)
