"""Checks of what users pass in."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .examples import Chunk, Episode

NOT_TEXT = (
    "a chunk is a mapping with input_ids (batch, tokens), got {given}: use "
    "model.adapt(chunk_text(text, tokenizer, model=model)), or chunk_examples for a list of examples"
)
PARTS = ("support", "query")


def check_at_least(minimum: int, **values: int) -> None:
    """Raise a ValueError that names the first of `values` below `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_iterable(name: str, items: Any) -> None:
    """Raise a ValueError if a single string or mapping was given in place of an iterable of them."""
    if isinstance(items, str | Mapping):
        raise ValueError(f"{name} must be an iterable, got a single {type(items).__name__}; put it in a list")


def check_episode(episode: Episode) -> None:
    """Raise a ValueError that shows the format if a row is no episode."""
    if not isinstance(episode, Mapping):
        found = f"a row of type {type(episode).__name__}"
    elif any(episode.get(part) is None for part in PARTS):
        found = f"a row with the keys {sorted(str(key) for key, value in episode.items() if value is not None)}"
    elif single := [part for part in PARTS if isinstance(episode[part], str | Mapping)]:
        found = f"{single[0]!r} of type {type(episode[single[0]]).__name__}"
    else:
        return
    raise ValueError(
        f'an episode is {{"support": [example, ...], "query": [example, ...]}}, got {found}: build episodes with '
        'episodes_from_documents or episodes_from_labels, or write {"support": [...], "query": [...]} rows yourself'
    )


def checked_chunks(chunks: Iterable[Chunk]) -> Iterable[Chunk]:
    """Check the chunks of `adapt` and `refine`. A single mapping, such as a tokenizer's output, is one chunk.

    Raises:
        ValueError: for text that was not cut into chunks.
    """
    if isinstance(chunks, Mapping):
        return [_checked_chunk(chunks)]
    if isinstance(chunks, str):
        raise ValueError(NOT_TEXT.format(given=f"the text {chunks!r:.40}"))
    return map(_checked_chunk, chunks)


def _checked_chunk(chunk: Chunk) -> Chunk:
    if not isinstance(chunk, Mapping):
        given = f"the text {chunk!r:.40}" if isinstance(chunk, str) else f"{type(chunk).__name__} {chunk!r:.40}"
        raise ValueError(NOT_TEXT.format(given=given))
    return {name: _as_tensor(value) if isinstance(value, list) else value for name, value in chunk.items()}


def _as_tensor(value: list) -> Tensor | list:
    """Token ids as a tokenizer gives them without `return_tensors`, (B, C); names of labels stay a list."""
    flat = value[0] if value and isinstance(value[0], list) else value
    return torch.atleast_2d(torch.tensor(value)) if all(isinstance(x, int) for x in flat) else value
