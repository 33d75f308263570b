"""Names of a linear state's classes, and what they are good for: numbers of one chunk or state as those of another.

Axes: B tasks, n examples of a chunk, C classes. Class c of a task is `names[c]`; a task may have fewer than C names.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Names = tuple[str, ...]  # of one task
OF_CLASSES = ("count", "total", "correction")  # the tensors (B, C, ...) of a state


def names_of_tasks(given: Sequence | None, known: tuple[Names, ...], labels: Tensor) -> tuple[Names, ...]:  # (B, n)
    """What the numbers in `labels` are called, for each task.

    Args:
        given: a chunk's `label_names`, one for each number: of the only task, or the same for all, or of each task.
            None: numbers are those of the state, and one beyond is called as it reads, such as "5".
        known: of the state.

    Raises:
        ValueError: for a label without a name, a name that occurs twice, or names for another number of tasks.
    """
    if given is None:
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
        if not -100 <= min(row, default=0) <= max(row, default=-1) < len(own) or any(-100 < x < 0 for x in row):
            raise ValueError(f"labels must be -100 or from 0 to {len(own) - 1}, one for each of label_names, got {row}")
    return names


def matched(labels: Tensor, names: tuple[Names, ...], known: tuple[Names, ...]) -> tuple[Tensor, tuple[Names, ...]]:
    """Labels (B, n) of classes `names` as numbers of `known`, to which names not yet there are appended.

    A task without a label in this chunk learns no names.

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
    """Names of both for each task, the known ones first, and which number each of the others has among them."""
    united = tuple(tuple(dict.fromkeys([*old, *new])) for old, new in zip(known, more, strict=True))
    places = [{name: c for c, name in enumerate(row)} for row in united]
    return united, [[own[name] for name in new] for own, new in zip(places, more, strict=True)]


def with_classes(tensors: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """The same sums with room for C classes; those beyond are empty, and dropped."""
    sized = {}
    for name, tensor in tensors.items():
        if name in OF_CLASSES:
            tensor = pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, num_classes - tensor.shape[1]))
        sized[name] = tensor
    return sized


def in_order(tensors: dict[str, Tensor], numbers: list[list[int]], num_classes: int) -> dict[str, Tensor]:
    """The same sums with class c of task b as number `numbers[b][c]` of C."""
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
    """Whether all classes are called by whole numbers, which models of vectors keep as they are."""
    return all(name.isdecimal() for name in names)
