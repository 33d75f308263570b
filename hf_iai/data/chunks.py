"""Chunks: the pieces that a model reads one at a time. Axes: B streams (tasks), C tokens of a chunk."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..tensors import NO_LOSS, pad_to
from .checks import check_at_least, check_iterable
from .examples import Chunk, Example, Tokens, text_ids, tokenize_example, with_end
from .labelled import is_labelled, labelled_chunks, labelled_side_by_side


def chunk_text(
    text: str | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chunk_size: int | None = None,
    model: Any = None,
) -> Iterator[Chunk]:
    """Cut a text into chunks of `chunk_size` tokens, lazily.

    An iterable of strings is read as one text in pieces. Each piece is tokenised when it is needed, so the iterable may
    be endless, such as `(row["text"] for row in load_dataset(..., streaming=True))`. Nothing is inserted between the
    pieces. To keep several texts apart, use `chunk_examples` with `{"text": ...}`.

    Args:
        text: a string, or its pieces in order.
        tokenizer: the base model's tokenizer; no special tokens are added.
        chunk_size: tokens per chunk (C); the last chunk may be shorter. By default as many as `model` can read at once.
        model: an IAI model. Its `usual_chunk_size` is used if `chunk_size` is None.

    Returns:
        A generator of `{"input_ids", "attention_mask", "labels"}`, each a long tensor (1, C). Every token has a loss.

    Raises:
        ValueError: if neither `chunk_size` nor `model` is given, `chunk_size` is below 1, or a piece is not a string.

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
    """Join examples into one stream of tokens and cut it into chunks of `chunk_size` tokens, lazily.

    Labels are set per token before the stream is cut, so an example may cross the boundary of two chunks. Plain
    `{"prompt", "completion"}` and `{"text"}` examples end with the tokenizer's end-of-sequence token, if it has one.
    That token counts as part of the completion.

    Rows `{"text", "label"}` whose labels are strings are labelled examples, for a linear state. Each text is tokenised
    by itself, with the tokenizer's special tokens, and truncated to its `model_max_length`. `chunk_size` then counts
    examples. The first row decides which of the two applies to all. To read such texts as tokens, remove the labels.

    Args:
        examples: any iterable of examples, which may be endless or a streaming dataset; formats: `tokenize_example`.
        tokenizer: the base model's tokenizer. It adds no special tokens, except those of its chat template and the end
            of a plain example.
        chunk_size: tokens per chunk (C), or labelled examples per chunk (n); the last chunk may be shorter. By default
            as many as `model` can read at once, or 20 examples if it has a linear state.
        model: an IAI model. Its `usual_chunk_size` is used if `chunk_size` is None.

    Returns:
        A generator of `{"input_ids", "attention_mask", "labels"}`, each a long tensor (1, C). For labelled rows, ids
        and mask are (1, n, T) and `labels` (1, n) are class numbers. Such a chunk also has `label_names`: the names of
        all classes met so far, in the order of their numbers.

    Raises:
        ValueError: if neither `chunk_size` nor `model` is given, `chunk_size` is below 1, `examples` is a single
            example, or an example has an unknown format or another one than the first.

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
    """Batch several streams of chunks: chunk k of the result holds chunk k of every stream.

    Shorter chunks are padded on the right. A stream that has ended continues as rows whose mask is all 0, until the
    last stream has ended. Such rows leave a state unchanged.

    Args:
        streams: B iterables of chunks with one row each, one iterable per task. If a chunk has no `attention_mask`, all
            its tokens are real; if it has no `labels`, all its real tokens have a loss.
        pad_token_id: the id of padding; any id of the vocabulary works.

    Returns:
        A generator of `{"input_ids", "attention_mask", "labels"}`, each a long tensor (B, C), where C is the length of
        the longest chunk in this step. Labelled examples have ids and mask (B, n, T), labels (B, n), and as
        `label_names` a list with the names of each task. Vectors are as `chunk_vectors` gives them, with B rows.

    Raises:
        ValueError: if there is no stream, or a chunk's shape is not (1, C), or (1, n, T) for labelled examples.

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
    """Join the tokens of all examples and cut them every `chunk_size`, reading no further than the current chunk."""
    stream = chain.from_iterable(zip(part["input_ids"], part["labels"], strict=True) for part in tokens)
    while piece := list(islice(stream, chunk_size)):
        ids, labels = zip(*piece, strict=True)
        yield {"input_ids": list(ids), "labels": list(labels)}


def _chunk_size(chunk_size: int | None, model: Any) -> int:
    if chunk_size is None and model is None:
        raise ValueError("the length of a chunk is unknown: give chunk_size (tokens), or the model that will read it")
    size = model.usual_chunk_size if chunk_size is None else chunk_size
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
        yield {key: torch.cat([pad_to((row or nothing)[key], [width], fill[key]) for row in rows]) for key in fill}


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
