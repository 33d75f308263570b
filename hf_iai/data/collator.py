"""EpisodeCollator: a batch of episodes as tensors. Axes: B episodes, K chunks of C tokens, Q queries of T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .chunks import check_at_least, split_tokens
from .episodes import Episode, check_disjoint_tokens
from .examples import NO_LOSS, Tokens, tokenize_example, with_end


@dataclass
class EpisodeCollator:
    """Turn a list of episodes into what a model's `forward` takes.

    The support examples of an episode are written one after the other and cut into chunks of `chunk_size` tokens, just
    as `chunk_examples` does, end-of-sequence tokens included; every query stands by itself. Everything is padded on
    the right with mask 0 and label -100: the last chunk, the queries, and the queries of episodes that have fewer. Only
    whole chunks that an episode has fewer than others stand in front: its last n chunks are the last n for all.

    The answers of an episode with `"labels"`, strings or lists of token ids, are out of that set (regime implicit).

    Args:
        tokenizer: of the base.
        chunk_size: C, tokens per chunk.
        max_chunks: keep only so many chunks per episode, the last ones: those right before the query. All by default.

    Returns:
        When called with episodes: `chunk_input_ids`, `chunk_attention_mask`, `chunk_labels` (B, K, C) and
        `input_ids`, `attention_mask`, `labels` (B, Q, T), all long. Without support, or with `max_chunks=0`, K is 0.
        Of label sets also `label_input_ids`, `label_attention_mask` (B, L, T): strings end as completions do, with the
        end-of-sequence token, if there is one.

    Raises:
        ValueError: `chunk_size` is below 1 or `max_chunks` below 0; no episode; an episode without a query, with an
            empty one, or with a query that is also in its support; labels in some of the episodes only.

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

    def __post_init__(self):
        check_at_least(1, chunk_size=self.chunk_size)
        if self.max_chunks is not None:
            check_at_least(0, max_chunks=self.max_chunks)

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, torch.Tensor]:
        if not episodes:
            raise ValueError("a batch needs at least one episode, got none")
        chunks, queries = zip(*map(self._chunks_and_queries, episodes), strict=True)
        longest = max(len(query["input_ids"]) for row in queries for query in row)
        # Chunks that an episode lacks stand in front, so that the last n of the axis are its last n.
        most = max(map(len, chunks))
        chunks = [[{"input_ids": [], "labels": []}] * (most - len(row)) + row for row in chunks]
        support = self._padded(chunks, self.chunk_size)
        batch = {f"chunk_{key}": value for key, value in support.items()} | self._padded(queries, longest)
        return batch | self._label_sets(episodes)

    def _label_sets(self, episodes: Sequence[Episode]) -> dict[str, torch.Tensor]:
        sets = [episode.get("labels") or [] for episode in episodes]
        if not any(sets):
            return {}
        if not all(sets):
            raise ValueError("some episodes of the batch have labels and others have none: batch them apart")
        tokens = [[self._label_tokens(label) for label in labels] for labels in sets]
        padded = self._padded(tokens, max(len(label["input_ids"]) for labels in tokens for label in labels))
        return {f"label_{key}": padded[key] for key in ("input_ids", "attention_mask")}

    def _label_tokens(self, label: str | list[int]) -> Tokens:
        if not isinstance(label, str):
            return {"input_ids": list(label), "labels": list(label)}
        example = {"text": label}
        return with_end(tokenize_example(example, self.tokenizer), example, self.tokenizer)

    def _chunks_and_queries(self, episode: Episode) -> tuple[list[Tokens], list[Tokens]]:
        support, query = (
            [tokenize_example(example, self.tokenizer) for example in episode[part]] for part in ("support", "query")
        )
        self._check_query(query)
        check_disjoint_tokens(support, query, self.tokenizer)
        support, query = (
            [with_end(*pair, self.tokenizer) for pair in zip(tokens, episode[part], strict=True)]
            for part, tokens in (("support", support), ("query", query))
        )
        chunks = list(split_tokens(support, self.chunk_size))
        return chunks if self.max_chunks is None else chunks[max(0, len(chunks) - self.max_chunks) :], query

    def _check_query(self, query: list[Tokens]) -> None:
        if not query:
            raise ValueError("an episode needs at least one query, got none")
        for number, tokens in enumerate(query):
            if not tokens["input_ids"]:
                raise ValueError(f"query {number} of an episode has no tokens; leave it out or give it content")

    def _padded(self, rows: Sequence[list[Tokens]], width: int) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(map(len, rows)), width)  # (B, K, C) or (B, Q, T)
        ids = torch.full(shape, self.tokenizer.pad_token_id or 0)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_LOSS)
        for b, row in enumerate(rows):
            for k, tokens in enumerate(row):
                length = len(tokens["input_ids"])
                ids[b, k, :length] = torch.tensor(tokens["input_ids"])
                mask[b, k, :length] = 1
                labels[b, k, :length] = torch.tensor(tokens["labels"])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
