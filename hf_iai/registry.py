"""What can be chosen in an `IAIConfig`: states, signals, heads and kinds of task register here, each under its name.

A part says which fields of the configuration mean something to it. So a field that nothing uses is refused in one
place, and a new part needs no change anywhere else: it registers itself where it is written.
"""

from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from typing import Any

from peft import LoraConfig


class Part:
    """A member of a registry: a state type, a signal, a head or a kind of task.

    Attributes:
        fields: fields of `IAIConfig` that mean something to it.
        fingerprint: those that decide what a state means, and so belong to its fingerprint.
        fingerprint_if_changed: the same, but only where the value is not the default. Fields that came later are here:
            the fingerprints of older adapters stay as they were.
    """

    fields: frozenset[str] = frozenset()
    fingerprint: frozenset[str] = frozenset()
    fingerprint_if_changed: frozenset[str] = frozenset()

    @classmethod
    def is_default(cls, config: Any, name: str) -> bool:
        """Whether a field has its default."""
        return getattr(config, name) == own_fields(config)[name]

    @classmethod
    def check(cls, config: Any) -> None:
        """Complete the fields that were left open, and check those that depend on each other.

        Raises:
            ValueError: for values that cannot work together.
        """


class Registry(dict[str, type[Part]]):
    """Name -> part, for one field of the configuration.

    Args:
        field: the field whose values are the names.
    """

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: make the class known as `name`.

        Raises:
            ValueError: for a name that is taken.

        Example:
            >>> from hf_iai.registry import Part, Registry
            >>> colours = Registry("colour")
            >>> @colours.register("red")
            ... class Red(Part):
            ...     fields = frozenset({"shade"})
            >>> colours["red"].fields
            frozenset({'shade'})
        """

        def add(part: type) -> type:
            if name in self:
                raise ValueError(f"{self.field}={name!r} is {self[name].__name__} already: choose another name")
            self[name] = part
            return part

        return add


STATES, SIGNALS, HEADS = Registry("state_type"), Registry("signal"), Registry("head")
TASKS = Registry("task")


def kind_of(config: Any) -> type[Part]:
    """The kind of task that a configuration describes, as a class; what registered last is asked first.

    Raises:
        ValueError: for a configuration that describes none.
    """
    for kind in reversed(TASKS.values()):
        if kind.matches(config):
            return kind
    raise ValueError(f"no kind of task fits this configuration; there are {list(TASKS)}")


def own_fields(config: Any) -> dict[str, Any]:
    """Name -> default of the fields that `IAIConfig` adds to PEFT's `LoraConfig`."""
    inherited = {field.name for field in dataclass_fields(LoraConfig)}
    return {field.name: field.default for field in dataclass_fields(config) if field.name not in inherited}


def unused_fields(config: Any, parts: list[type[Part]]) -> list[str]:
    """Fields that were given, though they mean nothing to the chosen parts."""
    used = frozenset().union(*(part.fields for part in parts))
    given = (name for name, default in own_fields(config).items() if getattr(config, name) != default)
    return [name for name in given if name not in used]


def decisive_fields(config: Any, parts: list[type[Part]]) -> set[str]:
    """Fields that the chosen parts add to the fingerprint."""
    changed = {name for p in parts for name in p.fingerprint_if_changed if not p.is_default(config, name)}
    return changed.union(*(part.fingerprint for part in parts))


def owners(field: str) -> list[str]:
    """The parts that a field means something to, such as `"state_type='lora'"`."""
    parts = ((registry, name, part) for registry in (TASKS, STATES, SIGNALS, HEADS) for name, part in registry.items())
    return [f"{registry.field}={name!r}" for registry, name, part in parts if field in part.fields]
