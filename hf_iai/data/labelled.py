"""Labelled texts as chunks and episodes. Axes: B tasks, K chunks of n examples, Q queries, T tokens of a text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from ..tensors import NO_LOSS, pad_to
from .checks import PARTS
from .collator_base import Batch, CollatorBase, stack, stack_chunks
from .examples import Chunk, Episode, Example

# What padding holds; `input_ids` are padded with the tokenizer's own padding id.
FILL = {"attention_mask": 0, "labels": NO_LOSS, "inputs_embeds": 0.0}

_NO_LIMIT = 10**6  # tokenizers without a limit have a `model_max_length` far above this


def is_labelled(example: Example) -> bool:
    """Whether an example is `{"text": ..., "label": ...}` and both values are given."""
    return isinstance(example, Mapping) and all(example.get(key) is not None for key in ("text", "label"))


def labelled_chunks(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, chunk_size: int
) -> Iterator[Chunk]:
    """Cut labelled examples into chunks of n, lazily. Labels are numbered in the order in which they are first met.

    `chunk_examples` calls this for rows with labels; see there.
    """
    numbers: dict[str, int] = {}
    examples, start = iter(examples), 0
    while rows := list(islice(examples, chunk_size)):
        _check_rows(rows, start)
        labels = [numbers.setdefault(row["label"], len(numbers)) for row in rows]
        texts = text_tokens([row["text"] for row in rows], tokenizer)
        yield {
            "input_ids": texts["input_ids"][None],  # (1, n, T)
            "attention_mask": texts["attention_mask"][None],
            "labels": torch.tensor([labels]),  # (1, n)
            "label_names": tuple(numbers),
        }
        start += len(rows)


def labelled_side_by_side(rows: Sequence[Chunk | None], pad_token_id: int) -> Chunk:
    """Batch the chunks of B tasks, one chunk per task. None stands for a task whose stream has ended."""
    there = [row for row in rows if row is not None]
    if len(kinds := {tuple(sorted(row)) for row in there}) > 1:
        raise ValueError(f"chunks side by side must hold the same, got {sorted(kinds)}: read texts and vectors apart")
    names = [() if row is None else tuple(row.get("label_names", ())) for row in rows]
    batch = {"label_names": names} if "label_names" in there[0] else {}  # real targets have no names
    for key in there[0].keys() - {"label_names"}:
        nothing = there[0][key][:, :0]  # (1, 0, T), or (1, 0)
        tensors = [nothing if row is None else row[key] for row in rows]
        size = [max(lengths) for lengths in zip(*(t.shape[1:] for t in tensors), strict=True)]
        batch[key] = torch.cat([pad_to(t, size, FILL.get(key, pad_token_id)) for t in tensors])
    return batch


@dataclass
class LabelledEpisodeCollator(CollatorBase):
    """Turns episodes of labelled texts into what the `forward` of a model with a linear state takes.

    The support of an episode is cut into chunks of `chunk_size` examples, as `chunk_examples` does it. Texts, the last
    chunk and missing queries are padded on the right, with mask 0 and label -100. If an episode has fewer chunks than
    others, whole chunks of padding stand in front, so the last n chunks of the batch are the last n of every episode.

    Args:
        tokenizer: the encoder's tokenizer; texts longer than its `model_max_length` are truncated.
        chunk_size: n, examples per chunk.

    Returns:
        When called with episodes `{"support": [{"text", "label"}...], "query": [...]}`: `chunk_input_ids`,
        `chunk_attention_mask` (B, K, n, T), `chunk_labels` (B, K, n) and `input_ids`, `attention_mask` (B, Q, T'),
        `labels` (B, Q), all long. Labels are class numbers; every episode numbers its own classes.

    Raises:
        ValueError: if `chunk_size` is below 1, there is no episode, a row is no episode, an episode has no query, an
            example has no text or no label, or the text of a query is also in the support.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import LabelledEpisodeCollator
        >>> support = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": "y"}]
        >>> collate = LabelledEpisodeCollator(ByT5Tokenizer(), chunk_size=2)
        >>> batch = collate([{"support": support, "query": [{"text": "d", "label": "y"}]}])
        >>> batch["chunk_labels"].tolist(), batch["labels"].tolist()
        ([[[0, 1], [1, -100]]], [[1]])
    """

    tokenizer: PreTrainedTokenizerBase
    chunk_size: int

    def _batch(self, episodes: Sequence[Episode]) -> Batch:
        support, queries = zip(*map(self._rows, episodes), strict=True)
        fill = FILL | {"input_ids": self.tokenizer.pad_token_id or 0}
        return stack_chunks(self._tensors(support), fill, self.chunk_size) | stack(self._tensors(queries), fill)

    def _rows(self, episode: Episode) -> tuple[list[Example], list[Example]]:
        support, query = ([{"text": r["text"], "label": r["label"]} for r in _checked(episode[part])] for part in PARTS)
        if both := {row["text"] for row in support} & {row["text"] for row in query}:
            raise ValueError(
                f"{min(both)!r:.120} is in the support and in the query of an episode; leave it out of one of them, or "
                "the model is scored on what it has just read"
            )
        numbers = {name: c for c, name in enumerate(dict.fromkeys(row["label"] for row in [*support, *query]))}
        return tuple([row | {"label": numbers[row["label"]]} for row in part] for part in (support, query))

    def _tensors(self, episodes: Sequence[list[Example]]) -> list[Batch]:
        """ids and mask (S, T) and labels (S,) of every episode, tokenised together so that T is the same for all."""
        texts = text_tokens([row["text"] for rows in episodes for row in rows] or [""], self.tokenizer)
        parts, taken = [], 0
        for rows in episodes:
            part = {name: tokens[taken : taken + len(rows)] for name, tokens in texts.items()}
            parts.append(part | {"labels": torch.tensor([row["label"] for row in rows], dtype=torch.long)})
            taken += len(rows)
        return parts


def _checked(rows: Sequence[Example]) -> Sequence[Example]:
    _check_rows(rows, 0)
    return rows


def _check_rows(rows: Sequence[Example], start: int) -> None:
    for number, row in enumerate(rows, start):
        if not is_labelled(row):
            raise ValueError(f"row {number} must have a text and a label, as rows before it: got {row!r:.120}")
        for key in ("text", "label"):
            if not isinstance(row[key], str):
                raise ValueError(
                    f"{key!r} of row {number} must be a string, got {row[key]!r:.80}; where labels are numbers, give "
                    "their names"
                )


def text_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:  # (n, T) each
    """Tokenise texts for an encoder: with special tokens, truncated if the tokenizer has a limit.

    Args:
        texts: n strings.
        tokenizer: the encoder's tokenizer.

    Returns:
        `input_ids` and `attention_mask`, padded on the right.
    """
    limited = tokenizer.model_max_length < _NO_LIMIT
    found = tokenizer(texts, padding=True, truncation=limited, padding_side="right", return_tensors="pt")
    return {key: found[key].long() for key in ("input_ids", "attention_mask")}
