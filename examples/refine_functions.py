"""String functions by refinement: each query keeps its own prediction (regime implicit), on the embedded base.

    python examples/refine_functions.py train --prediction logits --seed 0
    python examples/refine_functions.py evaluate --data FOLDER          # all seeds: refine_functions.json and .png

Tasks are those of examples/letter_tasks.py; with `--data`, a folder with fv_tasks, real words too. "At once" is the
same adapter with all that was read as its one and only chunk; "full context" the bare base.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import IterableDataset
from letter_tasks import CHUNK, LENGTH, drawn_episodes, real_episodes
from matplotlib.figure import Figure
from peft import AutoPeftModelForCausalLM, PeftModel
from provenance import provenance
from refine_recall import PREDICTIONS, make_model, over_seeds
from tqdm import tqdm
from training import train_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_iai import EpisodeCollator, embedded_base
from hf_iai.evaluation import bootstrap_mean

MOST_TRAINED, ASKED, WORK = 8, 16, Path("work/functions")
COUNTS = (0, 1, 2, 4, 8, 16, 28)  # the last two are more than training saw
MOST_REAL = 28  # chunks: there are 129 real words
AT_ONCE = 16  # the most chunks that fit the base's window together

app = typer.Typer(help=__doc__)


@app.command()
def train(
    prediction: str = "logits",
    seed: int = 0,
    steps: int = 2000,
    batch_size: int = 8,
    lr: float = 2e-3,
    work: Path = WORK,
) -> None:
    """Train one adapter on 1 to 8 chunks, words of one and of four letters."""
    set_seed(seed)
    base = embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    output = work / f"{prediction}-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    stream = {
        "lengths": (1, LENGTH, LENGTH, LENGTH),
        "num_letters": (4, 6, 10, 16, 26),  # few letters come again soon, and a chunk says much
        "num": steps * batch_size,
        "num_chunks": MOST_TRAINED,
        "num_asked": ASKED,
        "tokenizer": tokenizer,
        "seed": 1000 + seed,
    }
    train_adapter(
        make_model(base, prediction),
        IterableDataset.from_generator(drawn_episodes, gen_kwargs=stream),
        tokenizer,
        output,
        steps=steps,
        seed=seed,
        chunk_size=CHUNK,
        max_chunks=MOST_TRAINED,
        halve_chunks=0.0,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        warmup_steps=30,
        adam_beta2=0.98,
    )


# ---------------------------------------------------------------- what is answered right after so many chunks


def asked(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The queries (N, T) without their answers, which are their last tokens, and the answers (N,)."""
    ids, mask, labels = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels"))
    return {"input_ids": ids, "attention_mask": mask * (labels == -100)}, labels.amax(1)


def by_refining(model: PeftModel, batches: list[dict], at_once: bool = False) -> dict[int, np.ndarray]:
    """Number of chunks -> (E, Q), which queries are right after the first so many, one by one or as one."""
    found: dict[int, list] = {}
    for batch in tqdm(batches, leave=False):
        query, answers = asked(batch)
        chunks = batch["chunk_input_ids"]  # (B, K, C)
        if at_once:
            counts = [n for n in COUNTS if 0 < n <= AT_ONCE]
            steps = [(n, list(model.refine([{"input_ids": chunks[:, :n].flatten(1)}], query))[0]) for n in counts]
        else:
            read = [{"input_ids": chunk} for chunk in chunks.unbind(1)]
            steps = enumerate(model.refine(read, query, with_start=True))
        for n, logits in steps:
            if n in COUNTS:
                right = logits[:, 0].argmax(-1) == answers
                found.setdefault(n, []).append(right.view(len(chunks), -1))
    return {n: torch.cat(right).numpy() for n, right in found.items()}


@torch.no_grad()
def in_full_context(base, batches: list[dict]) -> dict[int, np.ndarray]:
    """The same of the bare base, which sees the first so many chunks at once."""
    found: dict[int, list] = {n: [] for n in COUNTS if n <= AT_ONCE}
    for batch in tqdm(batches, desc="full context", leave=False):
        query, answers = asked(batch)
        chunks, num_queries = batch["chunk_input_ids"], batch["input_ids"].shape[1]
        last = query["attention_mask"].sum(1) - 1
        for n, right in found.items():
            context = chunks[:, :n].flatten(1).repeat_interleave(num_queries, 0)  # (N, n C)
            logits = base(input_ids=torch.cat([context, query["input_ids"]], 1)).logits
            predicted = logits[torch.arange(len(last)), context.shape[1] + last].argmax(-1)
            right.append((predicted == answers).view(len(chunks), -1))
    return {n: torch.cat(right).numpy() for n, right in found.items()}


def known(tasks: list[dict]) -> dict[int, np.ndarray]:
    """The same of who knows the place and has a perfect memory: right where the letter was met."""
    after = np.array([[n or np.inf for n in task["known_after"]] for task in tasks])  # (E, Q)
    return {n: after <= n for n in COUNTS}


def rows_of(found: dict[int, np.ndarray], **names) -> list[dict]:
    """Exact match, intervals over tasks."""
    rows = []
    for n, right in found.items():
        match, low, high = bootstrap_mean(right.astype(float), np.arange(len(right)))
        rows.append(names | {"asked": "all", "num_chunks": n, "exact_match": match, "low": low, "high": high})
    return rows


def test_tasks(data: Path | None, num_tasks: int, tokenizer) -> dict[str, list[dict]]:
    """Setting -> tasks."""
    shape = (max(COUNTS), ASKED, tokenizer, 77)
    found = {
        "one letter (associative recall)": drawn_episodes((1,), (26,), num_tasks, *shape),
        "a letter of four": drawn_episodes((LENGTH,), (26,), num_tasks, *shape),
    }
    if data is not None:
        found["real words, functions with a name"] = real_episodes(data, num_tasks // 4, *shape)
    return {setting: list(tasks) for setting, tasks in found.items()}


@app.command()
def evaluate(
    data: Annotated[Path | None, typer.Option(help="folder of fv_tasks, for real words")] = None,
    num_tasks: int = 96,
    work: Path = WORK,
) -> None:
    """Every adapter under `work`, the same before training, and full context, on functions no training has seen."""
    base = embedded_base()
    bare, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    collate, rows = EpisodeCollator(tokenizer, CHUNK), []
    folders = sorted(path.parent for path in work.glob("*-*/adapter"))
    for setting, tasks in test_tasks(data, num_tasks, tokenizer).items():
        rest = iter(tasks)
        batches = [collate(some) for some in iter(lambda rest=rest: list(islice(rest, 8)), [])]
        rows += rows_of(known(tasks), setting=setting, method="known", seed=0)
        rows += rows_of(in_full_context(bare, batches), setting=setting, method="full context", seed=0)
        for prediction in dict.fromkeys(folder.name.split("-")[0] for folder in folders):
            untrained = by_refining(make_model(base, prediction).eval(), batches)
            rows += rows_of(untrained, setting=setting, method=f"{prediction}, untrained", seed=0)
        for folder in folders:
            method, seed = folder.name.split("-")
            model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
            for name, at_once in ((method, False), (f"{method}, at once", True)):
                rows += rows_of(by_refining(model, batches, at_once), setting=setting, method=name, seed=int(seed))
    command = f"python examples/refine_functions.py evaluate --num-tasks {num_tasks}"
    command += " --data FOLDER" if data else ""
    report = {"recipe": {"command": command, **provenance()}, "chance": 1 / 52, "rows": rows}
    (work / "refine_functions.tmp").write_text(json.dumps(report, indent=1) + "\n")
    (work / "refine_functions.tmp").replace(work / "refine_functions.json")
    print_table(rows)
    draw(rows, work / "refine_functions.png")


def print_table(rows: list[dict]) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        print(f"\n{setting}, chunks: {COUNTS}")
        for method in dict.fromkeys(row["method"] for row in rows):
            found = over_seeds(rows, setting, method)
            print(f"  {method:26s}", *(f"{np.mean(found[n]):.3f}" if n in found else "     " for n in COUNTS))


def draw(rows: list[dict], path: Path) -> None:
    """Exact match against chunks read, mean over seeds and their range."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    styles = {method: (f"C{i}", "-o") for i, method in enumerate(PREDICTIONS)}
    styles |= {f"{method}, at once": (f"C{i}", "--") for i, method in enumerate(PREDICTIONS)}
    styles |= {f"{method}, untrained": (f"C{i}", ":") for i, method in enumerate(PREDICTIONS)}
    styles |= {"full context": ("grey", "--"), "known": ("black", ":")}
    figure = Figure(figsize=(4.4 * len(settings), 4.2), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), sharey=True, squeeze=False)[0], settings, strict=True):
        for method, (color, style) in styles.items():
            found = over_seeds(rows, setting, method)
            if found:
                axes.plot(list(found), [np.mean(v) for v in found.values()], style, color=color, label=method)
                low, high = ([pick(v) for v in found.values()] for pick in (min, max))
                axes.fill_between(list(found), low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set(title=setting, xlabel=f"chunks read, {CHUNK} tokens each", ylabel="exact match", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    app()
