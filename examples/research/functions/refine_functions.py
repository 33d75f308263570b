"""String functions and associative recall as text, by refinement (regime implicit), on the embedded base.

    python -m examples.research.functions.refine_functions train --seed 0
    python -m examples.research.functions.refine_functions evaluate --data FOLDER    # all seeds

`evaluate` writes refine_functions.json and refine_functions.png. The tasks are those of `function_tasks.py`; with
`--data`, a folder with fv_tasks, real words too. "Full context" is the bare base with all chunks in its context.
"Known" is a perfect memory.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from datasets import IterableDataset
from peft import AutoPeftModelForCausalLM, PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.plots import doubling_axis, draw_curve, finish, panels, save
from examples.research.common.rows import chosen, grouped, interval, print_curves, with_range, write_rows
from examples.research.common.training import train_adapter
from examples.research.functions.function_tasks import (
    CHUNK,
    CHUNK_OF_FUNCTIONS,
    LENGTH,
    cipher_episodes,
    function_episodes,
    real_episodes,
)
from examples.research.recall.refine_recall import make_model
from hf_iai import embedded_base

MOST_TRAINED, ASKED, WORK = 8, 16, Path("work/functions")
COUNTS = (0, 1, 2, 4, 8, 16, 28)  # the last two are more than training saw

app = typer.Typer(help=__doc__)


@app.command()
def train(seed: int = 0, steps: int = 800, batch_size: int = 8, lr: float = 2e-3, work: Path = WORK) -> None:
    """Train one adapter on 1 to 8 chunks of ciphers, words of one and of four letters."""
    set_seed(seed)
    base = embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    output = work / f"refined-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    stream = {
        "lengths": (1, LENGTH),
        "num_letters": (4, 6, 10, 16, 26),  # few letters come again soon, and a chunk says much
        "num": steps * batch_size,
        "num_chunks": MOST_TRAINED,
        "num_asked": ASKED,
        "tokenizer": tokenizer,
        "seed": 1000 + seed,
    }
    train_adapter(
        make_model(base, "logits"),
        IterableDataset.from_generator(cipher_episodes, gen_kwargs=stream),
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

Found = dict[int, np.ndarray]  # number of chunks -> (E, Q), which queries are right


class Batch(NamedTuple):
    """Tasks of the same shape; a task with labels is a batch of its own."""

    text: torch.Tensor  # (B, S), what is read
    prompts: torch.Tensor  # (B, Q, T)
    answers: torch.Tensor  # (B, Q), tokens, or numbers of labels
    labels: list[list[int]] | None

    @property
    def chunk_size(self) -> int:
        return CHUNK if self.labels is None else CHUNK_OF_FUNCTIONS


def batches_of(tasks: list[dict], size: int = 8) -> Iterator[Batch]:
    if "labels" in tasks[0]:
        for task in tasks:
            prompts = [[query["input_ids"] for query in task["query"]]]
            text = [task["support"][0]["input_ids"][: max(COUNTS) * CHUNK_OF_FUNCTIONS]]
            yield Batch(*map(torch.tensor, (text, prompts, [task["answers"]])), task["labels"])
        return
    for start in range(0, len(tasks), size):
        some = tasks[start : start + size]
        text = [[token for line in task["support"] for token in line["input_ids"]] for task in some]
        asked = torch.tensor([[query["input_ids"] for query in task["query"]] for task in some])
        yield Batch(torch.tensor(text), asked[..., :-1], asked[..., -1], None)


def by_refining(model: PeftModel, tasks: list[dict]) -> Found:
    found = defaultdict(list)
    for batch in tqdm(list(batches_of(tasks)), leave=False):
        chunks = [{"input_ids": chunk} for chunk in batch.text.split(batch.chunk_size, 1)]
        query = {"input_ids": batch.prompts.flatten(0, 1)}
        for n, logits in enumerate(model.refine(chunks, query, labels=batch.labels, with_start=True)):
            if n in COUNTS:
                best = logits.view(batch.answers.numel(), -1).argmax(-1).view(batch.answers.shape)
                found[n].append(best == batch.answers)
    return {n: torch.cat(right).numpy() for n, right in found.items()}


@torch.no_grad()
def in_full_context(base, tasks: list[dict]) -> Found:
    """The same for the bare base with all of these chunks in its context, as far as its window goes."""
    counts = [n for n in COUNTS if (n + 1) * next(batches_of(tasks)).chunk_size <= base.config.max_position_embeddings]
    found = {n: [] for n in counts}
    for batch in tqdm(list(batches_of(tasks)), "full context", leave=False):
        for n in counts:
            read = batch.text[:, None, : n * batch.chunk_size].expand(-1, batch.prompts.shape[1], -1)
            best = _best(base, torch.cat([read, batch.prompts], -1).flatten(0, 1), batch.labels)
            found[n].append(best.view(batch.answers.shape) == batch.answers)
    return {n: torch.cat(right).numpy() for n, right in found.items()}


def _best(base, context: torch.Tensor, labels: list[list[int]] | None) -> torch.Tensor:  # (N, S) -> (N,)
    """The most probable token; with labels, of one context, the number of the most probable label."""
    if labels is None:
        return base(context).logits[:, -1].argmax(-1)
    ids = pad_sequence([torch.tensor(label) for label in labels], batch_first=True, padding_value=-1)  # (C, L)
    logits = base(torch.cat([context.expand(len(ids), -1), ids.clamp_min(0)], 1)).logits
    said = logits[:, context.shape[1] - 1 : -1].log_softmax(-1).gather(2, ids.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return said.masked_fill(ids < 0, 0.0).sum(1).argmax(keepdim=True)


def known(tasks: list[dict]) -> Found:
    """A perfect memory that knows that the last letter counts: right if this letter was shown."""
    after = np.array([[n or np.inf for n in task["known_after"]] for task in tasks])  # (E, Q)
    return {n: after <= n for n in COUNTS}


def rows_of(found: Found, **names) -> list[dict]:
    """Exact match, intervals over tasks."""
    rows = []
    for n, right in found.items():
        rows.append(names | {"asked": "all", "num_chunks": n} | interval(right.astype(float), "exact_match"))
    return rows


def test_tasks(data: Path | None, num: int, tokenizer) -> dict[str, list[dict]]:
    """Setting -> tasks."""
    shape = {"num_chunks": max(COUNTS), "tokenizer": tokenizer, "seed": 77}
    asked = shape | {"num_asked": ASKED}
    found = {
        "a letter (associative recall)": cipher_episodes((1,), (26,), num, **asked),
        "the last letter of a word": cipher_episodes((LENGTH,), (26,), num, **asked),
        "ten functions, untrained": function_episodes(num // 2, **shape),
    }
    if data is not None:
        found["the last letter of a real word"] = real_episodes(data, num, **asked)
    return {setting: list(tasks) for setting, tasks in found.items()}


@app.command()
def evaluate(
    data: Annotated[Path | None, typer.Option(help="folder of fv_tasks, for real words")] = None,
    num_tasks: int = 64,
    work: Path = WORK,
) -> None:
    """Test every adapter under `work`, an untrained one, and full context on ciphers and words not in training."""
    base = embedded_base()
    bare, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    untrained, rows = make_model(base, "logits").eval(), []
    for setting, tasks in test_tasks(data, num_tasks, tokenizer).items():
        rows += rows_of(in_full_context(bare, tasks), setting=setting, method="full context", seed=0)
        rows += rows_of(by_refining(untrained, tasks), setting=setting, method="untrained", seed=0)
        if "labels" in tasks[0]:  # no adapter is trained on functions
            continue
        rows += rows_of(known(tasks), setting=setting, method="known", seed=0)
        for folder in sorted(work.glob("refined-*/adapter")):
            model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
            seed = int(folder.parent.name.split("-")[1])
            rows += rows_of(by_refining(model, tasks), setting=setting, method="refined", seed=seed)
    command = f"research.functions.refine_functions evaluate --num-tasks {num_tasks}"
    write_rows(rows, work / "refine_functions.json", command + (" --data FOLDER" if data else ""))
    print_table(rows)
    draw(rows, work / "refine_functions.png")


def print_table(rows: list[dict]) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = {}
        for method in dict.fromkeys(row["method"] for row in rows if row["setting"] == setting):
            found = grouped(chosen(rows, setting=setting, method=method), "exact_match")
            cells[method] = {n: f"{np.mean(values):.3f}" for n, values in found.items()}
        print_curves(setting, "after chunks", COUNTS, cells)


def draw(rows: list[dict], path: Path) -> None:
    """Exact match against chunks read, mean over seeds and their range."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    styles = {"refined": ("C0", "-"), "untrained": ("C0", ":"), "full context": ("C7", "--"), "known": ("k", ":")}
    figure, found = panels(settings, across=len(settings), size=(4, 4), share_y=True)
    for axes, setting in zip(found, settings, strict=True):
        for method, (color, line) in styles.items():
            points = with_range(grouped(chosen(rows, setting=setting, method=method), "exact_match"))
            marker = "o" if method == "refined" else ""
            draw_curve(axes, *points, color=color, linestyle=line, marker=marker, label=method)
        doubling_axis(axes)
        axes.set_title(setting, fontsize=9)
        xlabel = f"chunks read, {CHUNK} or {CHUNK_OF_FUNCTIONS} tokens each"
        finish(axes, xlabel=xlabel, ylabel="exact match", ylim=(0, 1.02))
    save(figure, path, dpi=130)


if __name__ == "__main__":
    app()
