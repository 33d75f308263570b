"""Registries of state types, signals, heads and kinds of task: the parts that an `IAIConfig` chooses by name.

Each part declares the fields of the configuration that it uses. One loop then refuses every other field that was set.
A new part registers itself in its own file; no other file changes.
"""

from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from typing import Any

from peft import LoraConfig


class Part:
    """A member of a registry: a state type, a signal, a head or a kind of task.

    Attributes:
        fields: the fields of `IAIConfig` that it uses.
        fingerprint: the fields that change the meaning of a state, and so belong to the adapter's fingerprint.
        fingerprint_if_changed: the same, but only for values that differ from the default. Fields that were added later
            are listed here, so that the fingerprints of older adapters do not change.
    """

    fields: frozenset[str] = frozenset()
    fingerprint: frozenset[str] = frozenset()
    fingerprint_if_changed: frozenset[str] = frozenset()

    @classmethod
    def is_default(cls, config: Any, name: str) -> bool:
        """Whether a field has its default value."""
        return getattr(config, name) == defaults_of(config)[name]

    @classmethod
    def check(cls, config: Any) -> None:
        """Fill in fields that were left None, and check values that depend on each other.

        Raises:
            ValueError: for values that cannot work together.
        """


class Registry(dict[str, type[Part]]):
    """Maps names to parts, for one field of the configuration.

    Args:
        field: the field whose values are the names.
    """

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator that registers a class under `name`.

        Raises:
            ValueError: if the name is taken.

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
    """The class of the kind of task that a configuration describes. The last registered kind that matches wins.

    Raises:
        ValueError: if no kind matches.
    """
    for kind in reversed(TASKS.values()):
        if kind.matches(config):
            return kind
    raise ValueError(f"no kind of task fits this configuration; there are {list(TASKS)}")


def own_fields(config: Any) -> dict[str, Any]:
    """The fields that `IAIConfig` adds to PEFT's `LoraConfig`, with their defaults."""
    inherited = {field.name for field in dataclass_fields(LoraConfig)}
    return {field.name: field.default for field in dataclass_fields(config) if field.name not in inherited}


def defaults_of(config: Any) -> dict[str, Any]:
    """The defaults of the fields, with what the state type fills in for those left None."""
    return own_fields(config) | STATES[config.state_type].defaults


def unused_fields(config: Any, parts: list[type[Part]]) -> list[str]:
    """The names of fields that were set although none of the chosen parts uses them."""
    used = frozenset().union(*(part.fields for part in parts))
    # A switch that is off was not set: saved configurations say so for one that is open in a new configuration.
    values = {name: (getattr(config, name), default) for name, default in defaults_of(config).items()}
    given = (
        n for n, (value, default) in values.items() if value != default and not (default is None and value is False)
    )
    return [name for name in given if name not in used]


def decisive_fields(config: Any, parts: list[type[Part]]) -> set[str]:
    """The names of fields that the chosen parts add to the fingerprint."""
    changed = {name for p in parts for name in p.fingerprint_if_changed if not p.is_default(config, name)}
    return changed.union(*(part.fingerprint for part in parts))


def owners(field: str) -> list[str]:
    """The parts that use a field, as a configuration asks for them, such as `"state_type='lora'"`."""
    kinds = [kind.asked_for_by for kind in TASKS.values() if field in kind.fields]
    parts = ((registry, name, part) for registry in (HEADS, SIGNALS, STATES) for name, part in registry.items())
    return kinds + [f"{registry.field}={name!r}" for registry, name, part in parts if field in part.fields]
