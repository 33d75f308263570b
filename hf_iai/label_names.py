"""Names of a linear state's classes. By them, class numbers of one chunk or state are translated to those of another.

Axes: B tasks, n examples of a chunk, C classes. Class c of a task is `names[c]`; a task may have fewer than C names.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .tensors import NO_LOSS

Names = tuple[str, ...]  # class names of one task
MOST_UNNAMED = 10_000  # class numbers without names; more are likely ids of something
OF_CLASSES = ("count", "total", "fitted", "prototype", "mass")  # the tensors of a state with shape (B, C, ...)


def names_of_tasks(given: Sequence | None, known: tuple[Names, ...], labels: Tensor) -> tuple[Names, ...]:  # (B, n)
    """The class names that belong to the numbers in `labels`, for each task.

    Args:
        given: a chunk's `label_names`, one name for each class number: one list for all tasks, or a list of each task's
            names. None: class numbers are those of the state, and a new number is its own name, such as "5".
        known: the state's class names, for each task.
        labels: class numbers; -100 for padding.

    Raises:
        ValueError: if a label has no name, a name occurs twice, there are names for another number of tasks, or a
            number without names is beyond all reason.
    """
    if given is None:
        if labels.numel() and int(labels.max()) >= MOST_UNNAMED:
            raise ValueError(
                f"labels hold the class number {int(labels.max())} without label_names, which would make as many "
                f"classes: number them from 0 to at most {MOST_UNNAMED - 1}, or give label_names"
            )
        most = [max(-1, *row) + 1 for row in labels.tolist()]
        names = tuple(row + tuple(str(c) for c in range(len(row), m)) for row, m in zip(known, most, strict=True))
    elif all(isinstance(name, str) for name in given) and not isinstance(given, str):
        names = (tuple(given),) * len(labels)
    else:
        names = tuple(map(tuple, given))
    if len(names) != len(labels):
        raise ValueError(f"label_names of {len(names)} tasks for a chunk of {len(labels)}: give one list for each")
    for row, own in zip(labels.tolist(), names, strict=True):
        if len(set(own)) < len(own) or not all(isinstance(name, str) for name in own):
            raise ValueError(f"label_names must be different strings, got {list(own)[:20]}")
        if not NO_LOSS <= min(row, default=0) <= max(row, default=-1) < len(own) or any(NO_LOSS < x < 0 for x in row):
            raise ValueError(f"labels must be -100 or from 0 to {len(own) - 1}, one for each of label_names, got {row}")
    return names


def matched(labels: Tensor, names: tuple[Names, ...], known: tuple[Names, ...]) -> tuple[Tensor, tuple[Names, ...]]:
    """Translate labels to the class numbers of a state, and append classes that the state has not met yet.

    A task without a label in this chunk gets no new names.

    Args:
        labels: class numbers of the chunk, (B, n); -100 for padding.
        names: the chunk's class names, for each task.
        known: the state's class names, for each task.

    Returns:
        The state's class numbers (B, n), and its class names with the new ones.

    Example:
        >>> labels, known = matched(torch.tensor([[0, 1, -100]]), (("dog", "cat"),), (("cat",),))
        >>> labels.tolist(), known
        ([[1, 0, -100]], (('cat', 'dog'),))
    """
    names = [new if max(row, default=-1) >= 0 else () for new, row in zip(names, labels.tolist(), strict=True)]
    united, numbers = union(known, names)
    moved = [[c if c < 0 else own[c] for c in row] for row, own in zip(labels.tolist(), numbers, strict=True)]
    return torch.tensor(moved, dtype=labels.dtype, device=labels.device).view_as(labels), united


def union(known: Sequence[Names], more: Sequence[Names]) -> tuple[tuple[Names, ...], list[list[int]]]:
    """Unite two sets of class names for each task.

    Returns:
        All names, the known ones first; and for each name of `more` its number among them.
    """
    united = tuple(tuple(dict.fromkeys([*old, *new])) for old, new in zip(known, more, strict=True))
    places = [{name: c for c, name in enumerate(row)} for row in united]
    return united, [[own[name] for name in new] for own, new in zip(places, more, strict=True)]


def with_classes(tensors: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Give a state's tensors exactly C classes. New classes are empty; those beyond C must be empty and are dropped."""
    sized = {}
    for name, tensor in tensors.items():
        if name in OF_CLASSES:
            tensor = pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, num_classes - tensor.shape[1]))
        sized[name] = tensor
    return sized


def in_order(tensors: dict[str, Tensor], numbers: list[list[int]], num_classes: int) -> dict[str, Tensor]:
    """Renumber the classes of a state's tensors: class c of task b becomes number `numbers[b][c]` of C."""
    ordered = {}
    for name, tensor in tensors.items():
        if name in OF_CLASSES:
            moved = tensor.new_zeros(len(tensor), num_classes, *tensor.shape[2:])
            for task, own in enumerate(numbers):
                moved[task, own] = tensor[task, : len(own)]
            tensor = moved
        ordered[name] = tensor
    return ordered


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all class names are whole numbers. Models with `vector_width` keep such numbers."""
    return all(name.isdecimal() for name in names)
