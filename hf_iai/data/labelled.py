"""Labelled texts as chunks and episodes. Axes: B tasks, K chunks of n examples, Q queries, T tokens of a text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from .examples import NO_LOSS, Example

Chunk = Mapping[str, Any]
PARTS = ("support", "query")
# Of padding; ids are padded with the tokenizer's own.
FILL = {"attention_mask": 0, "labels": NO_LOSS, "inputs_embeds": 0.0}

_NO_LIMIT = 10**6  # tokenizers without a limit name a very large one


def is_labelled(example: Example) -> bool:
    """Whether this is `{"text": ..., "label": ...}`, with both given."""
    return isinstance(example, Mapping) and all(example.get(key) is not None for key in ("text", "label"))


def labelled_chunks(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, chunk_size: int
) -> Iterator[Chunk]:
    """Chunks of n examples each, lazily; a label gets the next number where it is first met.

    See `chunk_examples`, which calls this for rows with labels.
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
    """Chunks of one task each as one of B; None stands for a task that has ended."""
    there = [row for row in rows if row is not None]
    if len(kinds := {tuple(sorted(row)) for row in there}) > 1:
        raise ValueError(f"chunks side by side must hold the same, got {sorted(kinds)}: read texts and vectors apart")
    names = [() if row is None else tuple(row.get("label_names", ())) for row in rows]
    batch = {"label_names": names} if "label_names" in there[0] else {}  # there are none of real targets
    for key in there[0].keys() - {"label_names"}:
        nothing = there[0][key][:, :0]  # (1, 0, T), or (1, 0)
        tensors = [nothing if row is None else row[key] for row in rows]
        size = [max(lengths) for lengths in zip(*(t.shape[1:] for t in tensors), strict=True)]
        batch[key] = torch.cat([_to_size(t, size, FILL.get(key, pad_token_id)) for t in tensors])
    return batch


@dataclass
class LabelledEpisodeCollator:
    """Turn episodes of labelled texts into what the `forward` of a model with a linear state takes.

    The support of an episode is cut into chunks of `chunk_size` examples, as `chunk_examples` does it. Everything is
    padded on the right, with mask 0 and label -100, but for whole chunks that an episode has fewer than others: they
    stand in front, so that its last n chunks are the last n for all.

    Args:
        tokenizer: of the encoder; texts longer than its `model_max_length` are cut.
        chunk_size: n, examples per chunk.

    Returns:
        When called with episodes `{"support": [{"text", "label"}...], "query": [...]}`: `chunk_input_ids`,
        `chunk_attention_mask` (B, K, n, T), `chunk_labels` (B, K, n) and `input_ids`, `attention_mask` (B, Q, T'),
        `labels` (B, Q), all long. Labels are numbers within their episode.

    Raises:
        ValueError: for `chunk_size` below 1, no episode, an episode without a query, an example without text or label,
            or a query whose text is also in the support.

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

    def __post_init__(self):
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")

    def __call__(self, episodes: Sequence[Mapping[str, list[Example]]]) -> dict[str, torch.Tensor]:
        if not episodes:
            raise ValueError("a batch needs at least one episode, got none")
        support, queries = zip(*map(self._rows, episodes), strict=True)
        slots = -(-max(map(len, support)) // self.chunk_size) * self.chunk_size  # K n
        read = self._padded(support, slots, in_front=True)
        shape = (slots // self.chunk_size, self.chunk_size)
        read = {f"chunk_{key}": t.unflatten(1, shape) for key, t in read.items()}
        return read | self._padded(queries, max(map(len, queries)), in_front=False)

    def _rows(self, episode: Mapping[str, list[Example]]) -> tuple[list[Example], list[Example]]:
        support, query = ([{"text": r["text"], "label": r["label"]} for r in _checked(episode[part])] for part in PARTS)
        if not query:
            raise ValueError("an episode needs at least one query, got none")
        if both := {row["text"] for row in support} & {row["text"] for row in query}:
            raise ValueError(
                f"{min(both)!r:.120} is in the support and in the query of an episode; leave it out of one of them, or "
                "the model is scored on what it has just read"
            )
        numbers = {name: c for c, name in enumerate(dict.fromkeys(row["label"] for row in [*support, *query]))}
        return tuple([row | {"label": numbers[row["label"]]} for row in part] for part in (support, query))

    def _padded(self, episodes: Sequence[list[Example]], slots: int, *, in_front: bool) -> dict[str, torch.Tensor]:
        """ids and mask (B, slots, T), labels (B, slots); an episode's whole missing chunks in front, others behind."""
        texts = text_tokens([row["text"] for rows in episodes for row in rows] or [""], self.tokenizer)
        shape = (len(episodes), slots, texts["input_ids"].shape[1])
        padded = {"input_ids": torch.full(shape, self.tokenizer.pad_token_id or 0)}
        padded |= {"attention_mask": torch.zeros_like(padded["input_ids"]), "labels": torch.full(shape[:2], NO_LOSS)}
        taken = 0
        for b, rows in enumerate(episodes):
            first = (slots - len(rows)) // self.chunk_size * self.chunk_size if in_front else 0
            for key, tokens in texts.items():
                padded[key][b, first : first + len(rows)] = tokens[taken : taken + len(rows)]
            padded["labels"][b, first : first + len(rows)] = torch.tensor([row["label"] for row in rows])
            taken += len(rows)
        return padded


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
    """Texts as an encoder takes them: special tokens included, cut where the tokenizer has a limit."""
    limited = tokenizer.model_max_length < _NO_LIMIT
    found = tokenizer(texts, padding=True, truncation=limited, padding_side="right", return_tensors="pt")
    return {key: found[key].long() for key in ("input_ids", "attention_mask")}


def _to_size(tensor: torch.Tensor, size: list[int], fill: float) -> torch.Tensor:  # (1, n) or (1, n, T)
    room = [most - length for most, length in zip(size, tensor.shape[1:], strict=True)]
    return pad(tensor, [side for more in reversed(room) for side in (0, more)], value=fill)
