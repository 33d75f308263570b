"""The file of a task state: one safetensors file, whose metadata describes the tensors and carries a checksum.

    metadata["format"]   "hf_iai.task_state.v2"
    metadata["state"]    JSON: fingerprint, name, accumulation, tensors (name -> shape), label_names, notes, checksum

`config.json` beside it is a copy of this JSON for people. A kill may leave an older copy, which is fine. A copy that
somebody has changed is refused, because the change would have no effect. Files of format v1 have no checksum, and
`config.json` describes them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .files import replace_file
from .label_names import OF_CLASSES, Names

WEIGHTS, CONFIG = "task_state.safetensors", "config.json"
FORMAT, FORMAT_1 = "hf_iai.task_state.v2", "hf_iai.task_state.v1"
COUNTS = ("step", "num_tokens")
NOT_NEGATIVE = (*COUNTS, "precision", "count", "mass", "age", "kept_age", "square")
ACCUMULATIONS = ("average", "recent", "gradients", "both", "sums", "memory", "attention", "surprisal")
ACCUMULATIONS += tuple(f"kept by {rule}" for rule in ("attention", "surprisal", "recent", "worth"))

Fields = dict[str, Any]  # fingerprint, name, accumulation; label_names and notes where there are any


def write_state_file(folder: str | os.PathLike, tensors: Mapping[str, Tensor], fields: Fields) -> None:
    """Write a state. The file with the tensors is replaced in one step, and the copy of its fields after it.

    Args:
        folder: is made if it is missing.
        tensors: those of the state, and `step` and `num_tokens`.
        fields: see `Fields`.

    Raises:
        OSError: if nothing can be written there. An earlier state is as it was.
        ValueError: if a value is none that a state can have, such as NaN.
        FileExistsError: if the folder holds a `config.json` of something else, such as a model.
    """
    folder = Path(folder)
    _check_not_of_others(folder)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    fields = fields | {"tensors": {name: list(t.shape) for name, t in tensors.items()}}
    _check(tensors, fields, folder / WEIGHTS, folder / WEIGHTS)  # what could not be read again is lost
    fields |= {"checksum": _checksum(tensors, fields)}
    metadata = {"format": FORMAT, "state": json.dumps(fields)}
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
    copy = json.dumps({"format": FORMAT, **fields, "copy": _digest(fields)}, indent=1) + "\n"
    replace_file(folder / CONFIG, lambda path: path.write_text(copy, encoding="utf-8"))


def _check_not_of_others(folder: Path) -> None:
    if not (path := folder / CONFIG).exists():
        return
    try:
        ours = _parsed(path.read_bytes(), str(path)).get("format") in (FORMAT, FORMAT_1)
    except ValueError:
        ours = (folder / WEIGHTS).exists()
    if not ours:
        raise FileExistsError(f"{path} is not of a task state: save the state to a folder of its own")


def read_state_file(folder: str | os.PathLike) -> tuple[dict[str, Tensor], Fields]:
    """Read a state, and check every field.

    Args:
        folder: of the state.

    Returns:
        The tensors, `step` and `num_tokens` among them, and the fields.

    Raises:
        FileNotFoundError: if there is no state.
        ValueError: if the format is unknown, a file is damaged, or a value is none that a state can have. The message
            names file, field, what was found and what was expected.
    """
    weights = Path(folder, WEIGHTS)
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no task state: {WEIGHTS} is missing")
    tensors, metadata = _read_tensors(weights)
    if (found := metadata.get("format")) == FORMAT:
        fields, place = _parsed(metadata.get("state", ""), f"{weights}: its metadata"), weights
        if fields.get("checksum") != _checksum(tensors, fields):
            raise ValueError(f"{weights} is damaged: its checksum does not fit what it holds; save the state again")
        _check_copy(Path(folder, CONFIG))
    elif found == FORMAT_1:
        place = Path(folder, CONFIG)
        fields = _read_fields_of_format_1(place)
    else:
        raise ValueError(f"{weights} has format {found!r}, expected {FORMAT!r}: save the state again with hf_iai")
    _check(tensors, fields, weights, place)
    return tensors, fields


def read_notes(folder: str | os.PathLike) -> Fields:
    """What `TaskState.save_pretrained` was given as `notes`."""
    return read_state_file(folder)[1].get("notes", {})


# ---------------------------------------------------------------- reading


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = path.read_bytes()  # at once, because a writer may replace the file between two looks at it
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): save the state again") from error
    header = _parsed(data[8 : 8 + int.from_bytes(data[:8], "little")], f"{path}: its header")
    return tensors, header.get("__metadata__", {})


def _parsed(text: str | bytes, place: str) -> Fields:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON ({type(error).__name__}): save the state again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} is a {type(found).__name__}, expected an object: save the state again")
    return found


def _check_copy(path: Path) -> None:
    if not path.is_file():
        return
    copy = _parsed(path.read_bytes(), str(path))
    if copy.get("format") == FORMAT_1:  # of the state that was there before, left by a kill
        return
    fields = {name: value for name, value in copy.items() if name not in ("format", "copy")}
    if copy.get("copy") != _digest(fields) or copy.get("format") != FORMAT:
        raise ValueError(
            f"{path} was changed, which has no effect: it is a copy for people, and {WEIGHTS} decides. Remove "
            f"{CONFIG}, and load the state again"
        )


def _read_fields_of_format_1(path: Path) -> Fields:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no task state: {CONFIG} is missing")
    fields = _parsed(path.read_bytes(), str(path))
    if fields.get("format") != FORMAT_1:
        raise ValueError(f"{path} has format {fields.get('format')!r}, expected {FORMAT_1!r} as its {WEIGHTS}")
    return fields


# ---------------------------------------------------------------- checks


def _check(tensors: dict[str, Tensor], fields: Fields, path: Path, place: Path) -> None:
    """Check the tensors, which are in the file `path`, and the fields, which are in `place`."""
    _check_fields(fields, place)
    _check_tensors(tensors, fields, path, place)
    _check_names(fields, tensors, place)


def _check_fields(fields: Fields, place: Path) -> None:
    for name in ("fingerprint", "name"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise ValueError(f"{place}: {name} is {fields.get(name)!r:.80}, expected a text")
    if fields.get("accumulation") not in ACCUMULATIONS:
        raise ValueError(
            f"{place}: accumulation is {fields.get('accumulation')!r:.80}, expected one of {ACCUMULATIONS}"
        )
    if not isinstance(fields.get("notes", {}), dict):
        raise ValueError(f"{place}: notes are {fields['notes']!r:.80}, expected an object")


def _check_tensors(tensors: dict[str, Tensor], fields: Fields, path: Path, place: Path) -> None:
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    if shapes != fields.get("tensors"):
        raise ValueError(f"{path} holds tensors {shapes}, expected those of {place}: {fields.get('tensors')!r:.500}")
    for name in COUNTS:
        if name not in tensors or tensors[name].dtype != torch.int64 or tensors[name].dim() != 1:
            raise ValueError(f"{path}: {name} must be a vector of int64, one number for each task")
    batch = len(tensors["step"])
    for name, tensor in tensors.items():
        if tensor.dim() < 1 or len(tensor) != batch:
            raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, expected {batch} tasks as first axis")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{path}: {name} has the type {tensor.dtype}, expected floating or whole numbers")
        if tensor.numel() == 0:
            continue
        low, high = (x.item() for x in tensor.aminmax())
        most = torch.finfo(tensor.dtype).max ** 0.5 if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        if not -most <= low <= high <= most:  # a NaN is in no range
            raise ValueError(f"{path}: {name} has values from {low:g} to {high:g} that are not finite or too large")
        if low < 0 and name in NOT_NEGATIVE:
            raise ValueError(f"{path}: {name} has the value {low:g}, expected none below 0")


def _check_names(fields: Fields, tensors: dict[str, Tensor], place: Path) -> None:
    """Each task has as many names as classes with examples, or more; names are different strings."""
    if "label_names" not in fields:
        if any(name in tensors for name in OF_CLASSES[2:]):
            raise ValueError(f"{place}: label_names are missing for a state of classes")
        return
    given, count = fields["label_names"], tensors.get("count")
    if count is None or count.dim() != 2:
        raise ValueError(f"{place}: label_names are given for a state that has no classes")
    if not isinstance(given, list) or len(given) != len(count):
        raise ValueError(
            f"{place}: label_names are {given!r:.80}, expected a list of names for each of {len(count)} tasks"
        )
    for own, counted in zip(given, count, strict=True):
        are_texts = isinstance(own, list) and all(isinstance(name, str) for name in own)
        if not are_texts or len(set(own)) < len(own):
            raise ValueError(f"{place}: label_names are {own!r:.80}, expected different texts")
        if len(own) > len(counted) or counted[len(own) :].any() or (len(count) == 1 and len(own) != len(counted)):
            raise ValueError(
                f"{place}: label_names has {len(own)} names, expected one for each of {len(counted)} classes"
            )


def names_of(fields: Fields) -> tuple[Names, ...] | None:
    """The names of each task's classes, for a classifier."""
    return tuple(map(tuple, fields["label_names"])) if "label_names" in fields else None


# ---------------------------------------------------------------- checksums


def _checksum(tensors: Mapping[str, Tensor], fields: Fields) -> str:
    """Of all tensors, with names and types, and of all fields but the checksum itself."""
    digest = hashlib.sha256(_digest({k: v for k, v in fields.items() if k != "checksum"}).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(fields: Fields) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
