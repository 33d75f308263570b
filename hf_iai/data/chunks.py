"""Chunks: what a model reads in one refinement step. Axes: B streams (tasks), C tokens of a chunk."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from .examples import NO_LOSS, Example, Tokens, text_ids, tokenize_example, with_end
from .labelled import is_labelled, labelled_chunks, labelled_side_by_side

Chunk = Mapping[str, torch.Tensor]


def chunk_text(
    text: str | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chunk_size: int | None = None,
    model: Any = None,
) -> Iterator[Chunk]:
    """Read a text as chunks of `chunk_size` tokens, lazily.

    An iterable of strings is one text in pieces, each tokenised when it is needed: it may be endless, such as
    `(row["text"] for row in load_dataset(..., streaming=True))`. Nothing is put between the pieces; for texts that
    are to stay apart use `chunk_examples` with `{"text": ...}`.

    Args:
        text: a string, or its pieces in order.
        tokenizer: adds no special tokens.
        chunk_size: tokens per chunk (C); the last chunk may be shorter. By default what `model` can read at once.
        model: an IAI model, asked for its `max_chunk_size` when `chunk_size` is None.

    Returns:
        A generator of `{"input_ids", "attention_mask", "labels"}`, each a long tensor (1, C), all tokens with a loss.

    Raises:
        ValueError: neither `chunk_size` nor `model` is given, `chunk_size` is below 1, or a piece is no string.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import chunk_text
        >>> [chunk["input_ids"].tolist() for chunk in chunk_text("abcde", ByT5Tokenizer(), chunk_size=2)]
        [[[100, 101]], [[102, 103]], [[104]]]
    """
    if isinstance(text, Mapping):
        raise ValueError("text must be a string or an iterable of strings, got a mapping; see chunk_examples")
    pieces = (text_ids(piece, tokenizer) for piece in ([text] if isinstance(text, str) else text))
    tokens = ({"input_ids": ids, "labels": ids} for ids in pieces)
    return _chunks(tokens, _chunk_size(chunk_size, model))


def chunk_examples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chunk_size: int | None = None,
    model: Any = None,
) -> Iterator[Chunk]:
    """Read examples one after the other as chunks of `chunk_size` tokens, lazily.

    Labels are made per token before the stream is cut, so an example may cross the boundary of two chunks. After each
    `{"prompt", "completion"}` or `{"text"}` of plain strings stands the tokenizer's end-of-sequence token, if it has
    one, as part of the completion.

    Rows `{"text", "label"}`, with strings for labels, are examples for a linear state: each text stands by itself, with
    the tokenizer's special tokens, cut at its `model_max_length`, and `chunk_size` counts examples. The first row
    decides. For tokens of such texts leave the labels out.

    Args:
        examples: any iterable of examples (formats: `tokenize_example`), also an endless or a streaming one.
        tokenizer: adds no special tokens but those of its chat template and the end after a plain example.
        chunk_size: tokens per chunk (C), or labelled examples per chunk (n); the last chunk may be shorter. By default
            what `model` can read at once; 20 examples where it has a linear state.
        model: an IAI model, asked for its `max_chunk_size` when `chunk_size` is None.

    Returns:
        A generator of `{"input_ids", "attention_mask", "labels"}`, each a long tensor (1, C). Of labelled rows ids and
        mask are (1, n, T), `labels` (1, n) are numbers, and `label_names` says of what: all labels met so far, in the
        order in which they were met.

    Raises:
        ValueError: neither `chunk_size` nor `model` is given, `chunk_size` is below 1, `examples` is a single one, or
            an example has no known format, or not that of the rows before.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import chunk_examples
        >>> shots = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}]
        >>> first, second = chunk_examples(shots, ByT5Tokenizer(), chunk_size=8)
        >>> first["labels"].tolist(), second["labels"].tolist()
        ([[-100, -100, -100, -100, 53, 1, -100, -100]], [[-100, -100, 54, 1]])
        >>> rows = [{"text": "hi", "label": "greeting"}, {"text": "why", "label": "question"}]
        >>> (chunk,) = chunk_examples(rows, ByT5Tokenizer(), chunk_size=20)
        >>> chunk["input_ids"].shape, chunk["labels"].tolist(), chunk["label_names"]
        (torch.Size([1, 2, 4]), [[0, 1]], ('greeting', 'question'))
    """
    check_iterable("examples", examples)
    return _chunks_of_examples(iter(examples), tokenizer, _chunk_size(chunk_size, model))


def _chunks_of_examples(
    examples: Iterator[Example], tokenizer: PreTrainedTokenizerBase, chunk_size: int
) -> Iterator[Chunk]:
    first = list(islice(examples, 1))
    examples = chain(first, examples)
    if first and is_labelled(first[0]):
        yield from labelled_chunks(examples, tokenizer, chunk_size)
    else:
        tokens = (with_end(tokenize_example(example, tokenizer), example, tokenizer) for example in examples)
        yield from _chunks(tokens, chunk_size)


def batch_chunks(streams: Iterable[Iterable[Chunk]], pad_token_id: int = 0) -> Iterator[Chunk]:
    """Read several streams of chunks side by side: chunk k of the batch holds chunk k of every stream.

    Shorter chunks, of tokens or of labelled examples, are padded on the right. A stream that has ended gives rows whose
    mask is all 0, which leave a state as it is, until the last stream has ended.

    Args:
        streams: one iterable of single-row chunks per task (B of them). Without `attention_mask` all tokens count;
            without `labels` all that count have a loss.
        pad_token_id: the id at masked places; any id of the vocabulary will do.

    Returns:
        A generator of `{"input_ids", "attention_mask", "labels"}`, each a long tensor (B, C), C the longest chunk of
        that step. Of labelled examples (B, n, T) twice, and (B, n); `label_names` is a list of each task's names. Of
        vectors as `chunk_vectors` gives them, B tasks side by side.

    Raises:
        ValueError: no stream at all, or a chunk whose shape is not (1, C), or (1, n, T) of labelled examples.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import batch_chunks, chunk_text
        >>> streams = [chunk_text(text, ByT5Tokenizer(), chunk_size=2) for text in ("abc", "de")]
        >>> [chunk["attention_mask"].tolist() for chunk in batch_chunks(streams)]
        [[[1, 1], [1, 1]], [[1], [0]]]
    """
    iterators = [iter(stream) for stream in streams]
    if not iterators:
        raise ValueError("batch_chunks needs at least one stream of chunks, got none")
    return _side_by_side(iterators, pad_token_id)


def split_tokens(tokens: Iterable[Tokens], chunk_size: int) -> Iterator[Tokens]:
    """The tokens of all examples in a row, cut every `chunk_size`; reads no further than the chunk it yields."""
    stream = chain.from_iterable(zip(part["input_ids"], part["labels"], strict=True) for part in tokens)
    while piece := list(islice(stream, chunk_size)):
        ids, labels = zip(*piece, strict=True)
        yield {"input_ids": list(ids), "labels": list(labels)}


def check_at_least(minimum: int, **values: int) -> None:
    """Raise a ValueError that names the first of `values` below `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_iterable(name: str, items: Any) -> None:
    """Raise a ValueError where one string or mapping was given in place of an iterable of them."""
    if isinstance(items, str | Mapping):
        raise ValueError(f"{name} must be an iterable, got a single {type(items).__name__}; put it in a list")


def _chunk_size(chunk_size: int | None, model: Any) -> int:
    if chunk_size is None and model is None:
        raise ValueError("the length of a chunk is unknown: give chunk_size (tokens), or the model that will read it")
    size = model.max_chunk_size if chunk_size is None else chunk_size
    check_at_least(1, chunk_size=size)
    return size


def _chunks(tokens: Iterable[Tokens], chunk_size: int) -> Iterator[Chunk]:
    for piece in split_tokens(tokens, chunk_size):
        ids = torch.tensor([piece["input_ids"]])  # (1, C)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([piece["labels"]])}


def _side_by_side(iterators: list[Iterator[Chunk]], pad_token_id: int) -> Iterator[Chunk]:
    while any(rows := [next(iterator, None) for iterator in iterators]):
        if any("label_names" in row or "inputs_embeds" in row for row in rows if row):
            yield labelled_side_by_side(rows, pad_token_id)
            continue
        rows = [row and _complete(row) for row in rows]
        width = max(row["input_ids"].shape[1] for row in rows if row)
        nothing = {key: value[:, :0] for key, value in next(row for row in rows if row).items()}
        fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": NO_LOSS}
        yield {key: torch.cat([_widen((row or nothing)[key], width, fill[key]) for row in rows]) for key in fill}


def _complete(chunk: Chunk) -> Chunk:
    ids = chunk["input_ids"]  # (1, C)
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"each stream must yield chunks of shape (1, C), got input_ids of shape {tuple(ids.shape)}")
    mask = chunk.get("attention_mask", torch.ones_like(ids))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": chunk.get("labels", ids.masked_fill(mask == 0, NO_LOSS)),
    }


def _widen(row: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return pad(row, (0, width - row.shape[1]), value=value)  # (1, width)
