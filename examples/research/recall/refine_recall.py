"""Associative recall by refinement: each query keeps its own prediction, and there is no task state (regime implicit).

    python -m examples.research.recall.refine_recall train --base work/recall/base --prediction logits --seed 0
    python -m examples.research.recall.refine_recall evaluate --base work/recall/base    # all seeds

`evaluate` writes refine_recall.json and refine_recall.png. The base is made by `python -m
examples.research.recall.associative_recall base`; the tasks are those of `recall_tasks.py`. Chance is 1 / 64.
Untrained, the prediction is a product of experts of the bare base (or a mixture of experts, or a mean of latents).
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import IterableDataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.plots import doubling_axis, draw_curve, finish, panels, save
from examples.research.common.rows import chosen, grouped, interval, print_curves, with_range, write_rows
from examples.research.common.training import train_adapter
from examples.research.recall.recall_tasks import (
    CHUNK,
    NUM_VALUES,
    PAIRS,
    PAIRS_PER_CHUNK,
    REWRITE_RATE,
    growing_episodes,
    recall_episodes,
)
from hf_iai import IAIConfig

PREDICTIONS = ("logits", "probabilities", "latent")
SETTINGS = {"64 pairs": 0.0, "25% rewritten": REWRITE_RATE, "100% rewritten": 1.0}  # the last is longer than training
ASKED, WORK = 32, Path("work/refine")

Base = Annotated[Path, typer.Option(help="folder of the base, with its tokenizer")]

app = typer.Typer(help=__doc__)


def make_model(base: Path, prediction: str) -> PeftModel:
    config = IAIConfig(
        task_type="CAUSAL_LM",
        regime="implicit",
        prediction=prediction,
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
    )
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


@app.command()
def train(
    base: Base,
    prediction: str = "logits",
    seed: int = 0,
    steps: int = 300,
    batch_size: int = 4,
    lr: float = 3e-3,
    work: Path = WORK,
) -> None:
    """Train one adapter; queries may be about any chunk, so every step reads all of them."""
    set_seed(seed)
    output = work / f"{prediction}-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    most_chunks = round(PAIRS * (1 + REWRITE_RATE)) // PAIRS_PER_CHUNK
    stream = {
        "num": steps * batch_size,
        "num_pairs": PAIRS,
        "rewrite_rate": REWRITE_RATE,
        "num_asked": ASKED,
        "seed": 1000 + seed,
    }
    train_adapter(
        make_model(base, prediction),
        IterableDataset.from_generator(growing_episodes, gen_kwargs=stream),
        AutoTokenizer.from_pretrained(base),
        output,
        steps=steps,
        seed=seed,
        chunk_size=CHUNK,
        min_chunks=most_chunks,
        max_chunks=most_chunks,
        halve_chunks=0.0,
        scored_states="last",
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        warmup_steps=30,
        adam_beta2=0.98,
    )


# ---------------------------------------------------------------- what is answered right after so many chunks


def counts_of(tasks: list[dict]) -> list[int]:
    most = tasks[0]["num_chunks"]
    return sorted({n for n in (0, 1, 2, 4, 8, 16) if n < most} | {most})


def tensors(tasks: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """The writes (E, W), and the asked pairs (E, Q, 2)."""
    written = torch.tensor([task["support"][0]["input_ids"] for task in tasks])
    return written, torch.tensor([[query["input_ids"] for query in task["query"]] for task in tasks])


def by_refining(model: PeftModel, tasks: list[dict], batch_size: int = 8) -> dict[int, np.ndarray]:
    """n -> which queries (E, Q) are right after the first n chunks."""
    written, asked = tensors(tasks)
    found: dict[int, list] = {n: [] for n in counts_of(tasks)}
    for texts, pairs in tqdm(zip(written.split(batch_size), asked.split(batch_size), strict=True), leave=False):
        chunks = [{"input_ids": chunk} for chunk in texts.split(CHUNK, 1)]
        query = {"input_ids": pairs[..., 0].reshape(-1, 1)}
        for n, logits in enumerate(model.refine(chunks, query, with_start=True)):
            if n in found:
                found[n].append(logits[:, 0].argmax(-1).view(pairs.shape[:2]) == pairs[..., 1])
    return {n: torch.cat(right).numpy() for n, right in found.items()}


@torch.no_grad()
def in_full_context(base, tasks: list[dict]) -> dict[int, np.ndarray]:
    """The same for the bare base with the first n chunks in its context."""
    written, asked = tensors(tasks)
    found: dict[int, list] = {n: [] for n in counts_of(tasks)}
    for text, pairs in tqdm(zip(written, asked, strict=True), total=len(tasks), desc="full context", leave=False):
        for n, right in found.items():
            context = text[: n * CHUNK].expand(len(pairs), -1)
            logits = base(input_ids=torch.cat([context, pairs[:, :1]], 1)).logits[:, -1]
            right.append(logits.argmax(-1) == pairs[:, 1])
    return {n: torch.stack(right).numpy() for n, right in found.items()}


def rows_of(found: dict[int, np.ndarray], tasks: list[dict], **names) -> list[dict]:
    """Exact match of all keys and, after all chunks, of the keys that were written twice; intervals over tasks."""
    rewritten, rows = np.array([task["rewritten"] for task in tasks]), []
    for n, right in found.items():
        groups = {"all": np.ones_like(rewritten)}
        groups |= {"rewritten": rewritten} if n == max(found) and rewritten.any() else {}
        for asked, counts in groups.items():
            values = np.where(counts, right.astype(float), np.nan)
            rows.append(names | {"asked": asked, "num_chunks": n} | interval(values, "exact_match"))
    return rows


@app.command()
def evaluate(base: Base, num_tasks: int = 64, work: Path = WORK) -> None:
    """Test every adapter under `work`, untrained ones, and full context on tasks that no training has seen."""
    bare, rows = AutoModelForCausalLM.from_pretrained(base).eval(), []
    untrained = {f"{prediction}, untrained": make_model(base, prediction).eval() for prediction in PREDICTIONS}
    folders = sorted(path.parent for path in work.glob("*-*/adapter"))
    for setting, rate in SETTINGS.items():
        tasks = recall_episodes(num_tasks, rewrite_rate=rate, seed=77)
        rows += rows_of(in_full_context(bare, tasks), tasks, setting=setting, method="full context", seed=0)
        for method, model in untrained.items():
            rows += rows_of(by_refining(model, tasks), tasks, setting=setting, method=method, seed=0)
        for folder in folders:
            method, seed = folder.name.split("-")
            model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
            rows += rows_of(by_refining(model, tasks), tasks, setting=setting, method=method, seed=int(seed))
    command = f"research.recall.refine_recall evaluate --base {base} --num-tasks {num_tasks}"
    write_rows(rows, work / "refine_recall.json", command, chance=1 / NUM_VALUES)
    print_table(rows)
    draw(rows, work / "refine_recall.png")


def print_table(rows: list[dict]) -> None:
    for setting in SETTINGS:
        of_setting, cells = chosen(rows, setting=setting), {}
        for method, asked in dict.fromkeys((row["method"], row["asked"]) for row in of_setting):
            found = grouped(chosen(of_setting, method=method, asked=asked), "exact_match")
            name = method if asked == "all" else f"{method}: {asked}"
            cells[name] = {n: f"{np.mean(values):.3f}" for n, values in found.items()}
        print_curves(setting, "after chunks", sorted({row["num_chunks"] for row in of_setting}), cells)


def draw(rows: list[dict], path: Path) -> None:
    """Exact match of all keys against chunks read, mean over seeds and their range."""
    lines = {}
    for color, prediction in enumerate(PREDICTIONS):
        lines[prediction] = {"color": f"C{color}", "marker": "o"}
        lines[f"{prediction}, untrained"] = {"color": f"C{color}", "linestyle": ":"}
    lines["full context"] = {"color": "grey", "linestyle": "--"}
    figure, found = panels(list(SETTINGS), size=(13 / 3, 4.2), share_y=True)
    for axes, setting in zip(found, SETTINGS, strict=True):
        for method, style in lines.items():
            of_method = chosen(rows, setting=setting, method=method, asked="all")
            draw_curve(axes, *with_range(grouped(of_method, "exact_match")), label=method, **style)
        doubling_axis(axes)
        xlabel = f"chunks read, {PAIRS_PER_CHUNK} pairs each"
        finish(axes, xlabel=xlabel, ylabel="exact match, all keys", ylim=(0, 1.02))
    save(figure, path, dpi=130)


if __name__ == "__main__":
    app()
