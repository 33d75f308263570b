"""Checks of what users pass in."""

from collections.abc import Mapping
from typing import Any

from .examples import Episode

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
