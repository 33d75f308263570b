"""Does this tree say what an earlier commit says? Keys, fingerprints, states, logits and training of every member.

    python -m examples.maintain.compare_trees --commit SHA                  # about 4 minutes on two idle cores
    python -m examples.maintain.compare_trees --commit SHA --only "text llama prefix" --no-training

Both trees are probed at the same time, with one thread each, by the same file: `probe_tree.py`, which says what the
members are. All that is found must be equal bitwise, but what training gives: that may differ by 1e-6. It ends with
exit code 1 and a list of what differs. Differences that are wanted, such as a fault that was mended, go to `--allow`.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("probe_tree.py")
PARTS = ("keys", "fingerprint", "states", "logits", "gradients", "training")
TOLERANCE = 1e-6  # of training
SHOWN = 5  # of one part of a member, in the list of what differs
# Sums depend on the number of threads, and the order of a set on the seed of hashes.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a tree says: tensors and values under `MEMBER/PART/NAME`, and the members that failed."""

    tensors: dict[str, Tensor]
    values: dict[str, object]
    errors: dict[str, str]
    members: list[str]

    @classmethod
    def of(cls, folder: Path) -> "Found":
        values = json.loads((folder / "values.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        return cls(tensors, values["values"], values["errors"], list(values["seconds"]))


@dataclass(frozen=True)
class Difference:
    """Of one entry; `size` is the largest of a tensor's values, or None where there is no such number."""

    key: str
    what: str
    size: float | None = None

    @property
    def place(self) -> tuple[str, str]:
        member, part, _ = self.key.split("/", 2)
        return member, part

    @property
    def tolerated(self) -> bool:
        return self.place[1] == "training" and self.size is not None and self.size <= TOLERANCE


# ---------------------------------------------------------------- probing


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A temporary worktree of a commit of this repository."""
    with TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise typer.BadParameter(f"git {' '.join(arguments)}: {done.stderr.strip()}")


def probed(tree: Path, folder: Path, options: list[str], progress: Progress, task: TaskID) -> Found:
    """What a tree says, in a process of its own.

    Raises:
        RuntimeError: where the probe did not come to its end.
    """
    folder.mkdir()
    command = [sys.executable, str(PROBE), "--tree", str(tree), "--output", str(folder), *options]
    log = folder / "log.txt"
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(tree)}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors) as run,
    ):
        for line in run.stdout:
            kind, _, rest = line.strip().partition(" ")
            if kind == "members":
                progress.update(task, total=int(rest))
            elif kind == "done":
                progress.advance(task)
    if run.returncode:
        raise RuntimeError(f"the probe of {tree} ended with {run.returncode}:\n{log.read_text()[-3000:]}")
    return Found.of(folder)


def both_probed(trees: dict[str, Path], options: list[str], console: Console) -> list[Found]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        TemporaryDirectory() as folder,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(len(trees)) as pool,
    ):
        runs = []
        for number, (name, tree) in enumerate(trees.items()):
            task = progress.add_task(name, total=None)
            runs.append(pool.submit(probed, tree, Path(folder, str(number)), options, progress, task))
        return [run.result() for run in runs]


# ---------------------------------------------------------------- comparing


def differences(before: Found, now: Found) -> list[Difference]:
    """Also those that are tolerated."""
    found = []
    for kind, compare in (("tensors", _of_tensors), ("values", _of_values)):
        old, new = getattr(before, kind), getattr(now, kind)
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                found.append(Difference(key, f"only in {'this tree' if key in new else 'the commit'}"))
            elif (difference := compare(key, old[key], new[key])) is not None:
                found.append(difference)
    return found


def _of_tensors(key: str, old: Tensor, new: Tensor) -> Difference | None:
    """Bitwise, so that NaN equals itself."""
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return Difference(key, f"{old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}")
    old_bytes, new_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (old, new))
    if torch.equal(old_bytes, new_bytes):
        return None
    both_nan = old.isnan() & new.isnan()
    distance = (old.double() - new.double()).abs().masked_fill(both_nan | (old == new), 0.0)
    size = distance.nan_to_num(nan=float("inf")).max().item()
    return Difference(key, f"differs by up to {size:.2g} in {tuple(old.shape)}", size)


def _of_values(key: str, old: object, new: object) -> Difference | None:
    if old == new:
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        old, new = ([pair[side] for pair in pairs] for side in (0, 1))
    return Difference(key, f"{old!r:.200} became {new!r:.200}")


# ---------------------------------------------------------------- reporting


def report(before: Found, now: Found, allowed: list[str], console: Console) -> bool:
    """The table, and what differs; whether nothing does that is neither tolerated nor allowed."""
    found = defaultdict(list)
    for difference in differences(before, now):
        found[difference.place].append(difference)
    errors = {("the commit", name): error for name, error in before.errors.items()}
    errors |= {("this tree", name): error for name, error in now.errors.items()}
    failed = {name for _, name in errors}
    members = list(dict.fromkeys((*before.members, *now.members)))
    console.print(_table(members, failed, _places(before) | _places(now), found))
    wrong = {place: [d for d in found.get(place, []) if not d.tolerated] for place in product(members, PARTS)}
    wrong = {place: own for place, own in wrong.items() if own}
    _print_differences(wrong, allowed, console)
    for (tree, name), error in errors.items():
        console.print(f"{name} failed in {tree}: {error}", markup=False, highlight=False)
    left = [d for own in wrong.values() for d in own if not _matches(d.key, allowed)]
    unexplained = [name for name in failed if not _matches(name, allowed)]
    trained = [d.size for own in found.values() for d in own if d.tolerated]
    console.print(
        f"{len(members)} members, {len(now.tensors)} tensors, {len(now.values)} values: {len(left)} entries differ and "
        f"{len(unexplained)} members failed, beside what is allowed; training within {TOLERANCE:g} differs by up to "
        f"{max(trained, default=0.0):.2g}",
        highlight=False,
    )
    return not left and not unexplained


def _print_differences(wrong: dict[tuple[str, str], list[Difference]], allowed: list[str], console: Console) -> None:
    for (member, part), own in wrong.items():
        number = sum(_matches(difference.key, allowed) for difference in own)
        note = f", {number} of them allowed" if number else ""
        console.print(f"{member}, {part}: {len(own)} entries differ{note}", markup=False, highlight=False, style="bold")
        for difference in own[:SHOWN]:
            console.print(f"    {difference.key.split('/', 2)[2]}: {difference.what}", markup=False, highlight=False)
        if len(own) > SHOWN:
            console.print(f"    and {len(own) - SHOWN} more")


def _places(tree: Found) -> set[tuple[str, str]]:
    """Member and part of all that was found."""
    return {tuple(key.split("/", 2)[:2]) for key in (*tree.tensors, *tree.values)}


def _matches(key: str, allowed: list[str]) -> bool:
    return any(text in key for text in allowed)


def _table(members: list[str], failed: set[str], present: set[tuple[str, str]], found: dict) -> Table:
    table = Table("member", *PARTS)
    for member in members:
        cells = [_cell((member, part), present, found.get((member, part), [])) for part in PARTS]
        table.add_row(f"[red]{escape(member)}: failed[/red]" if member in failed else escape(member), *cells)
    return table


def _cell(place: tuple[str, str], present: set[tuple[str, str]], own: list[Difference]) -> str:
    if place not in present:
        return ""
    if not own:
        return "equal"
    sizes = [d.size for d in own if d.size is not None]
    largest = f"{max(sizes):.1e}" if sizes else ""
    return f"within {largest}" if all(d.tolerated for d in own) else f"[red]differs {largest}[/red]"


def main(
    commit: Annotated[str, typer.Option(help="The commit to compare this tree with.")],
    only: Annotated[str, typer.Option(help="Members whose name holds this.")] = "",
    training: Annotated[bool, typer.Option(help="Train too.")] = True,
    allow: Annotated[
        list[str] | None, typer.Option(help="Differences that are wanted: part of MEMBER/PART/NAME. Can be repeated.")
    ] = None,
) -> None:
    """Compare this tree, as it lies there, with a commit."""
    console = Console()
    if not console.is_terminal:
        console.width = 140
    options = ["--only", only, "--training" if training else "--no-training"]
    with checkout(commit) as tree:
        before, now = both_probed({f"commit {commit[:12]}": tree, "this tree": ROOT}, options, console)
    if not before.members and not now.members:
        raise typer.BadParameter(f"no member's name holds {only!r}")
    if not report(before, now, allow or [], console):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
