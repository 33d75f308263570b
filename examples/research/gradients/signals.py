"""Observations, gradients or both: one adapter for each signal, on library code and on associative recall.

    python -m examples.research.gradients.signals train --task code --signal both --seed 0    # 3 minutes on one core
    python -m examples.research.gradients.signals evaluate --task code       # all adapters that were trained
    python -m examples.research.gradients.signals report                     # the tables
    python -m examples.research.gradients.signals curve                      # one signal on code, next to baselines

All have prefix states in the explicit regime and the same number of training steps. Code: the loss of the 128 tokens
after chunks of 64, in packages that neither base nor adapter was trained on. Recall: the exact match of 32 pairs, 8 of
them rewritten, in 10 chunks. Its base is made by `python -m examples.research.recall.associative_recall base --steps
1000`.
"""

import json
from pathlib import Path

import numpy as np
import torch
import typer
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.plots import doubling_axis, finish, panels, save
from examples.research.common.rows import chosen, interval, print_curves, write_rows
from examples.research.common.training import train_adapter
from examples.research.documents.adapt_to_documents import report as write_curve
from examples.research.gradients.steps_to_quality import CHUNK, documents, query_losses, windows
from examples.research.recall.associative_recall import from_state
from examples.research.recall.recall_tasks import CHUNK as RECALL_CHUNK
from examples.research.recall.recall_tasks import PAIRS_PER_CHUNK, REWRITE_RATE, growing_episodes, recall_episodes
from hf_iai import EpisodeCollator, IAIConfig, embedded_base
from hf_iai.evaluation import Curve, evaluate_curve
from hf_iai.trainer import last_chunks

SIGNALS = ("observations", "gradients", "both")
PAIRS = 32
RECALL_CHUNKS = round(PAIRS * (1 + REWRITE_RATE)) // PAIRS_PER_CHUNK
SLOTS = {"code": 16, "recall": 8}
COUNTS = {"code": (0, 1, 2, 4, 8, 16), "recall": (0, 1, 2, 4, 8, RECALL_CHUNKS)}
UNITS = {"code": "loss, nats per token", "recall": "exact match"}
CODE_CHUNKS = 8  # the most in training
WORK, RECALL_BASE = Path("work/signals"), Path("work/recall/base")

app = typer.Typer(help=__doc__)


def base_of(task: str) -> str:
    return embedded_base() if task == "code" else str(RECALL_BASE)


@app.command()
def train(
    task: str = "code",
    signal: str = "both",
    seed: int = 0,
    steps: int = 400,
    batch_size: int = 8,
    lr: float = 1e-3,
    work: Path = WORK,
) -> None:
    """Train one adapter, starting from its checkpoint if there is one."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_of(task))
    config = IAIConfig(
        task_type="CAUSAL_LM",
        signal=signal,
        num_state_tokens=SLOTS[task],
        delta_rule=task == "recall" and signal != "gradients",
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_of(task)), config)
    if task == "code":
        episodes = windows(documents(None, None, "train"), tokenizer, CODE_CHUNKS, steps * batch_size, seed, 8)
        reading = {"chunk_size": CHUNK, "max_chunks": CODE_CHUNKS}
    else:
        episodes = recall_training(steps * batch_size, seed)
        reading = {"chunk_size": RECALL_CHUNK, "min_chunks": RECALL_CHUNKS, "max_chunks": RECALL_CHUNKS}
        reading |= {"halve_chunks": 0.0}  # every query may be about any chunk
    train_adapter(
        model,
        episodes,
        tokenizer,
        work / f"{task}-{signal}-{seed}",
        steps=steps,
        seed=seed,
        scored_states="last",
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        state_learning_rate=10 * lr if task == "code" else None,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        **reading,
    )


def recall_training(num: int, seed: int) -> IterableDataset:
    values = {"num": num, "num_pairs": PAIRS, "rewrite_rate": REWRITE_RATE, "num_asked": PAIRS, "seed": 1000 + seed}
    return IterableDataset.from_generator(growing_episodes, gen_kwargs=values)


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def code_losses(model, batches: list[dict], num_chunks: int) -> np.ndarray:  # (E, 1)
    found = []
    for batch in batches:
        chunks = last_chunks(batch, num_chunks)
        names = ("input_ids", "attention_mask", "labels")
        read = [dict(zip(names, (chunks[f"chunk_{n}"][:, k] for n in names), strict=True)) for k in range(num_chunks)]
        state = model.adapt(read) if read else model.initial_state(len(batch["input_ids"]))
        found.append(query_losses(model, state, {name: batch[name][:, 0] for name in names}))
    return np.concatenate(found)[:, None]


@app.command()
def evaluate(task: str = "code", num: int = 128, work: Path = WORK) -> None:
    """Test every trained adapter of a task on data that no training has seen."""
    tokenizer = AutoTokenizer.from_pretrained(base_of(task))
    if task == "code":
        test = windows(documents(None, None, "test"), tokenizer, max(COUNTS[task]), num, 0, 2)
        groups, batches = list(test["group"]), _batches(test, EpisodeCollator(tokenizer, CHUNK))
    else:
        tasks = recall_episodes(num, PAIRS, REWRITE_RATE, seed=77)
        groups = list(range(num))
    rows = []
    for folder in sorted(work.glob(f"{task}-*/adapter")):
        _, signal, seed = folder.parent.name.split("-")
        model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        for n in COUNTS[task]:
            values = code_losses(model, batches, n) if task == "code" else from_state(model, tasks, n).astype(float)
            row = {"signal": signal, "seed": int(seed), "num_chunks": n, "mean": float(values.mean())}
            rows.append(row | {"values": values.mean(1).round(4).tolist()})
    command = f"research.gradients.signals evaluate --task {task} --num {num} --work {work}"
    write_rows(rows, work / f"{task}.json", command, indent=None, task=task, groups=groups)


@app.command()
def curve(signal: str = "both", num: int = 128, work: Path = WORK) -> None:
    """Test every code adapter with one signal, next to fewer shots and full context of the bare base: curve.json."""
    tokenizer, curves = AutoTokenizer.from_pretrained(embedded_base()), []
    test = windows(documents(None, None, "test"), tokenizer, max(COUNTS["code"]), num, 0, 2)
    for folder in sorted(work.glob(f"code-{signal}-*/adapter")):
        model, seed = AutoPeftModelForCausalLM.from_pretrained(folder).eval(), int(folder.parent.name.split("-")[-1])
        curves.append(evaluate_curve(model, test, COUNTS["code"], tokenizer=tokenizer, chunk_size=CHUNK, seed=seed))
    command = f"python -m examples.research.gradients.signals curve --signal {signal} --num {num} --work {work}"
    write_curve(Curve.concat(curves), work, command=command, windows=len(test), files=len(set(test["group"])))


def _batches(episodes: Dataset, collate: EpisodeCollator, size: int = 16) -> list[dict]:
    rows = list(episodes)
    return [collate(rows[first : first + size]) for first in range(0, len(rows), size)]


@app.command()
def report(work: Path = WORK, output: Path = WORK.parent) -> None:
    """Print means over seeds and compare `both` with the better of the two signals at each count; draw signals.png."""
    paths = (work / f"{task}.json" for task in COUNTS)
    reports = [json.loads(path.read_text()) for path in paths if path.exists()]
    for found in reports:
        task, groups = found["task"], np.array(found["groups"])
        values = {signal: [_values(found, signal, n) for n in COUNTS[task]] for signal in SIGNALS}
        cells = {
            signal: {
                n: f"{v.mean():.4f} ±{v.mean(1).std(ddof=1):.4f}" for n, v in zip(COUNTS[task], found, strict=True)
            }
            for signal, found in values.items()
        }
        better, ahead = 1 if task == "recall" else -1, {}
        for n, observed, gradient, both in zip(COUNTS[task], *values.values(), strict=True):
            best = max(observed, gradient, key=lambda v: better * v.mean())
            gain = interval((better * (both - best)).T, groups=groups)
            ahead[n] = "{mean:+.4f} ({low:+.4f} .. {high:+.4f})".format(**gain)
        print_curves(f"{task}: after so many chunks", "signal", COUNTS[task], cells | {"both is ahead by": ahead})
    draw(reports, output / "signals.png")


def draw(reports: list[dict], path: Path) -> None:
    """A panel for each task; bars are standard deviations over training seeds."""
    figure, axes_of = panels([found["task"] for found in reports], size=(4.5, 3.5))
    for axes, found in zip(axes_of, reports, strict=True):
        at = COUNTS[found["task"]]
        for signal in SIGNALS:
            means = np.stack([_values(found, signal, n).mean(1) for n in at])  # (counts, S)
            axes.errorbar(at, means.mean(1), means.std(1, ddof=1), marker=".", label=signal)
        doubling_axis(axes, at)
        finish(axes, fontsize=8, xlabel="chunks read", ylabel=UNITS[found["task"]])
    save(figure, path)


def _values(found: dict, signal: str, num_chunks: int) -> np.ndarray:  # (S, E)
    rows = chosen(found["rows"], signal=signal, num_chunks=num_chunks)
    return np.array([row["values"] for row in sorted(rows, key=lambda row: row["seed"])])


if __name__ == "__main__":
    app()
