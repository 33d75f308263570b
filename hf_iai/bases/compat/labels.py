"""The names of classes that pipelines look up in a model's configuration: those of the state in use."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_in_use: ContextVar[Mapping[int, Sequence[str]]] = ContextVar("label_names", default={})  # noqa: B039, never changed


class NamesInUse(dict):
    """An `id2label` that gives the names of `names_in_use` in such a context, and else its own. Copies are plain."""

    def __getitem__(self, number: int) -> str:
        names = _in_use.get().get(id(self), ())
        return names[number] if number < len(names) else super().__getitem__(number)

    def __deepcopy__(self, memo: dict) -> dict:
        return dict(self)

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


@contextmanager
def names_in_use(config: Any, names: Sequence[str]) -> Iterator[None]:
    """A context in which `config.id2label`, where pipelines look names up, gives these names, in this thread only."""
    if names and not isinstance(config.id2label, NamesInUse):
        config.id2label = NamesInUse(config.id2label)
    token = _in_use.set({**_in_use.get(), id(config.id2label): names})
    try:
        yield
    finally:
        _in_use.reset(token)
