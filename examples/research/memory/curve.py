"""Loss of each chunk before it is learned from, against the number of chunks read, beside baselines that read the same.

    python -m examples.research.memory.curve measure memory --text windows     # half an hour on two cores
    python -m examples.research.memory.curve report --text windows

`measure` adds a text at a time to `work/memory/TEXT/LABEL.json`, and goes on where it was stopped. `report` takes
LABEL_seed0, LABEL_seed1, ... as the seeds of one method, and the mean of their losses. Methods:

    memory          a prefix+lora state, untrained        none           the chunk alone
    slots           its slots alone: H2O                  fewer          the latest m tokens
    recent          slots that hold the latest tokens     fewer_bytes    as many as fit the bytes of the saved memory
    full            all tokens, at 1, 2, 4, 8 and 16      adam, sgd      a plain LoRA that takes a step on each chunk
    window          the latest tokens that fit the base, at those and at 64
    attention_matching    slots with fitted values and biases
"""

import json
import math
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common import plots
from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.bfloat16 import ProductsInFloat32
from examples.research.common.files import seeds_of_methods, write_json
from examples.research.common.provenance import earlier, recipe
from examples.research.memory import methods, texts
from examples.research.memory.attention_matching import attention_matching
from hf_iai.evaluation import bootstrap_mean

app = typer.Typer(no_args_is_help=True)
WORK = Path("work/memory")
COUNTS = (1, 2, 4, 8, 16)
BLOCKS = {"1": (1, 1), "2": (2, 2), "4": (4, 4), "8": (8, 8), "16": (16, 16), "9-16": (9, 16)}
BLOCKS |= {"17-32": (17, 32), "33-64": (33, 64), "64": (64, 64)}
EARLY, LATE = slice(9, 17), slice(33, 65)  # after so many chunks


class Kind(StrEnum):
    """What is read: windows of 17 chunks, streams of 65, or windows of books."""

    windows = "windows"
    streams = "streams"
    books = "books"


NUM = {Kind.windows: 48, Kind.streams: 16, Kind.books: 24}
CHUNKS = {Kind.windows: 17, Kind.streams: 65, Kind.books: 17}


def method_of(name: str, base, slots: int, values: dict, *, rate: float, begin: bool, every: int) -> methods.Method:
    """The method of that name; `values` are fields of the memory's configuration."""
    if name == "memory":
        return methods.memory(base, slots=slots, **values)[0]
    if name == "slots":
        return methods.memory(base, slots=slots, state_type="prefix", accumulation="attention")[0]
    if name == "recent":
        return methods.memory(base, slots=slots, accumulation="recent", initial_rate=1e-30)[0]
    if name in ("adam", "sgd"):
        return methods.dynamic_evaluation(base, slots, rate, name, begin=begin)
    if name == "attention_matching":
        return attention_matching(base, slots)
    if name == "full":
        return methods.full_context(base, (0, *COUNTS), begin=begin)
    if name == "fewer_bytes":
        _, model = methods.memory(base, slots=slots, **values)
        slots = methods.state_bytes(model)["all"] // methods.slot_bytes(base)
        model.unload()
        return methods.context(base, slots, (0, *COUNTS), begin=begin)
    if name == "window":
        num_tokens = base.config.max_position_embeddings - slots - int(begin)  # a chunk has as many tokens as slots
        return methods.context(base, num_tokens, (0, *COUNTS, 64), begin=begin)
    if name == "none":
        return methods.context(base, 0, (0, *COUNTS), begin=begin)
    asked = None if every == 1 else {1, 2, *range(0, max(CHUNKS.values()), every)}
    return methods.context(base, slots, asked, begin=begin)


@app.command()
def measure(
    method: str,
    text: Annotated[Kind, typer.Option(help="What is read.")] = Kind.windows,
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 256,
    num: Annotated[int | None, typer.Option(help="How many texts; by default 48 windows, 16 streams.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Chunks of each text; by default 17 or 65.")] = None,
    values: Annotated[
        str, typer.Option(help="Fields of the memory's configuration, as JSON; in place of an adapter's.")
    ] = "{}",
    adapter: Annotated[Path | None, typer.Option(help="A memory that was trained.")] = None,
    rate: Annotated[float, typer.Option(help="Rate of adam and sgd.")] = 1e-3,
    begin: Annotated[bool, typer.Option(help="Whether baselines see a beginning token.")] = False,
    every: Annotated[int, typer.Option(help="fewer is asked after 0, 1, 2, and every so many chunks.")] = 1,
    seed: Annotated[int, typer.Option(help="Draws A of the memory.")] = 0,
    dtype: str = "float32",
    data: Annotated[Path, typer.Option(help="Folder of books.")] = Path("../shared/data/text"),
    validation: Annotated[bool, typer.Option(help="Read the packages for choosing settings.")] = False,
    label: Annotated[str | None, typer.Option(help="Name of the result; by default that of the method.")] = None,
    work: Path = WORK,
) -> None:
    """Measure one method."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    length, num = (chunks or CHUNKS[text]) * size, num or NUM[text]
    sources = texts.books(data) if text is Kind.books else texts.packages(validation)
    draw = texts.streams if text is Kind.streams else texts.windows
    drawn = draw(sources, tokenizer, length, num)
    path = work / ("validation" if validation else "") / text / f"{label or method}.json"
    settings = {
        "seed": seed,
        "base": base,
        "size": size,
        "values": values,
        "adapter": None if adapter is None else str(adapter),
        "rate": rate,
        "begin": begin,
        "dtype": dtype,
    }
    done = {name: earlier(path, **settings).get(name, []) for name in ("losses", "groups")}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
    values_of_memory = {"seed": seed, "adapter": adapter} | json.loads(values)
    read = method_of(method, model, size, values_of_memory, rate=rate, begin=begin, every=every)
    for found in tqdm(drawn[len(done["losses"]) :], method, disable=None):
        with ProductsInFloat32() if dtype == "bfloat16" else nullcontext():
            losses = read(torch.tensor([found.ids]), size)
        done["losses"].append([None if math.isnan(loss) else round(loss, 5) for loss in losses])
        done["groups"].append(found.group)
        command = f"research.memory.curve measure {method} --text {text}"
        write_json({"recipe": recipe(command, **settings), **done}, path, indent=None)


def load(*paths: Path) -> tuple[np.ndarray, np.ndarray]:  # (N, n), (N,)
    """The losses of a method, in the mean over its seeds, and the groups of the texts that all of them have read."""
    found = [json.loads(path.read_text()) for path in paths]
    num = min(len(seed["losses"]) for seed in found)
    losses, groups = [np.array(seed["losses"][:num], float) for seed in found], [seed["groups"][:num] for seed in found]
    if any(part.shape != losses[0].shape or of != groups[0] for part, of in zip(losses, groups, strict=True)):
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"{names} have read different texts: measure them anew, or rename what is no seed")
    return np.mean(losses, 0), np.array(groups[0])


@app.command()
def report(
    text: Annotated[Kind, typer.Option(help="What was read.")] = Kind.windows,
    method: Annotated[list[str], typer.Option(help="A method that is compared with all others.")] = ["memory"],  # noqa: B006
    validation: Annotated[bool, typer.Option(help="Of the packages for choosing settings.")] = False,
    work: Path = WORK,
    output: Annotated[Path, typer.Option(help="Folder for memory_TEXT.json and .png.")] = WORK,
) -> None:
    """Print every method's loss, and the paired differences of `method` to the others, clustered by package or book."""
    folder = work / ("validation" if validation else "") / text
    paths = seeds_of_methods(folder)
    found = {name: load(*of_seeds) for name, of_seeds in paths.items()}
    blocks = blocks_of(max(losses.shape[1] for losses, _ in found.values()))
    means = {name: _means(losses, {"0": (0, 0)} | blocks) for name, (losses, _) in found.items()}
    spread = {name: _spread(of_seeds, blocks) for name, of_seeds in paths.items() if len(of_seeds) > 1}
    compared = {
        ours: {name: differences(*found[ours], losses, blocks) for name, (losses, _) in found.items() if name != ours}
        for ours in method
    }
    _show(text, {name: len(losses) for name, (losses, _) in found.items()}, blocks, means, spread, compared)
    draw(found, method[-1], output / f"memory_{text}.png", str(text))
    recipes = {path.stem: json.loads(path.read_text())["recipe"] for of_seeds in paths.values() for path in of_seeds}
    report = {"texts": {name: len(losses) for name, (losses, _) in found.items()}}
    report |= {"groups": sorted({group for _, groups in found.values() for group in groups})}
    report |= {"means": means, "deviation over seeds": spread, "differences": compared, "measured": recipes}
    common = min(len(losses) for losses, _ in found.values())  # texts that all methods have read
    report["rows"] = [row for name, of_seeds in paths.items() for row in _rows(name, of_seeds, common)]
    command = f"research.memory.curve report --text {text} {' '.join(f'--method {name}' for name in method)}"
    write_json({"recipe": recipe(command), **report}, output / f"memory_{text}.json")


def _rows(method: str, of_seeds: list[Path], num: int) -> list[dict]:
    """The mean loss over the first `num` texts after each count that was asked, for each seed."""
    rows = []
    for seed, path in enumerate(of_seeds):
        losses = load(path)[0][:num]
        asked = [n for n in (0, *COUNTS, 64) if n < losses.shape[1] and not np.isnan(losses[:, n]).all()]
        of = {"seed": seed} if len(of_seeds) > 1 else {}
        rows += [
            {"method": method, **of, "num_chunks": n, "loss": float(np.nanmean(losses[:, n])), "texts": num}
            for n in asked
        ]
    return rows


def _show(text: Kind, num: dict, blocks: dict, means: dict, spread: dict, compared: dict) -> None:
    """Print the table of all methods, and the slopes of the differences."""
    table = Table("nats per token, after chunks", "texts", "0", *blocks, title=str(text))
    for name, of_blocks in means.items():
        cells = (of_blocks.get(at) for at in ("0", *blocks))
        table.add_row(name, str(num[name]), *("" if mean is None else f"{mean:.3f}" for mean in cells))
    for name, of_blocks in spread.items():
        cells = (f"{of_blocks[at]:.3f}" if at in of_blocks else "" for at in blocks)
        table.add_row(f"{name}: deviation over seeds", "", "", *cells)
    pairs = [(f"{ours} - {name}", found) for ours, others in compared.items() for name, found in others.items()]
    for pair, found in pairs:
        cells = ("{:+.3f} ({:+.3f}, {:+.3f})".format(*found[at]) if found.get(at) else "" for at in blocks)
        table.add_row(pair, "", "", *cells)
    Console(width=240).print(table)
    for pair, found in pairs:
        if found["slope"] is not None:
            print("slope of {} on log2(chunks): {:+.4f} ({:+.4f}, {:+.4f})".format(pair, *found["slope"]))
        if late := found.get("33-64 less 9-16"):
            print("{}: after 33-64 chunks less after 9-16: {:+.3f} ({:+.3f}, {:+.3f})".format(pair, *late))


def blocks_of(num_chunks: int) -> dict[str, tuple[int, int]]:
    """The blocks of chunks that texts of so many chunks have."""
    return {name: block for name, block in BLOCKS.items() if block[1] < num_chunks}


def _means(losses: np.ndarray, blocks: dict) -> dict[str, float | None]:
    found = {name: losses[:, first : last + 1] for name, (first, last) in blocks.items() if first < losses.shape[1]}
    return {name: None if np.isnan(part).all() else round(float(np.nanmean(part)), 4) for name, part in found.items()}


def _spread(of_seeds: list[Path], blocks: dict) -> dict[str, float]:
    """The standard deviation over seeds of the mean loss, on the texts that all of them have read."""
    num = len(load(*of_seeds)[0])
    means = [_means(load(path)[0][:num], blocks) for path in of_seeds]
    asked = [name for name in blocks if means[0].get(name) is not None]
    return {name: round(float(np.std([mean[name] for mean in means], ddof=1)), 4) for name in asked}


def differences(ours: np.ndarray, groups: np.ndarray, losses: np.ndarray, blocks: dict) -> dict:
    """Paired, with intervals, over the texts and counts that both methods were measured at."""
    num, length = min(len(losses), len(ours)), min(losses.shape[1], ours.shape[1])
    paired, found = ours[:num, :length] - losses[:num, :length], {}
    for name, (first, last) in blocks.items():
        if last >= length:
            continue
        part = paired[:, first : last + 1]
        found[name] = None if np.isnan(part).all() else bootstrap_mean(part, groups[:num])
    if length > LATE.stop - 1:
        late = np.nanmean(paired[:, LATE], 1) - np.nanmean(paired[:, EARLY], 1)  # (N,)
        found["33-64 less 9-16"] = bootstrap_mean(late[:, None], groups[:num])
    return found | {"slope": slope(paired, groups[:num])}


def slope(difference: np.ndarray, groups: np.ndarray) -> tuple[float, float, float] | None:  # (N, n), (N,)
    """The slope of a paired difference on log2 of the chunks read, from 1 to 16, and its interval."""
    counts = np.arange(1, min(17, difference.shape[1]))
    counts = counts[~np.isnan(difference[:, counts]).any(0)]
    if len(counts) < 3:
        return None
    x = np.log2(counts)
    x = (x - x.mean()) / np.square(x - x.mean()).sum()
    return bootstrap_mean((difference[:, counts] @ x)[:, None], groups)


def draw(found: dict, method: str, path: Path, title: str) -> None:
    """The difference to the latest m tokens after 1, 2, 4, ... chunks; of texts that all methods have read."""
    base, _ = found["fewer"] if "fewer" in found else found[method]
    num = min(len(losses) for losses, _ in found.values())
    figure, (axes,) = plots.panels([f"{title}: loss less that of the latest tokens"], size=(7, 4.5))
    for number, (name, (losses, _)) in enumerate((n, f) for n, f in found.items() if n != "none"):
        difference = losses[:num] - base[:num]
        at = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < difference.shape[1]]
        points = [(n, difference[:, n].mean()) for n in at if not np.isnan(difference[:, n]).any()]
        plots.draw_curve(axes, *zip(*points, strict=True), color=f"C{number}", marker="o", label=name)
    plots.doubling_axis(axes, at)
    plots.finish(axes, xlabel="chunks read", ylabel="nats per token")
    plots.save(figure, path)


if __name__ == "__main__":
    app()
