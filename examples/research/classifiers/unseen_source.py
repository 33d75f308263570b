"""Intents of a corpus that training has not seen: the readers are trained on the other corpus.

    python -m examples.research.classifiers.unseen_source --data DATA    # two hours on one core

DATA is that of `meta_train_intents`. Two measurements are made:

- work/intents/unseen_source.json: streams of up to 20 chunks, of 10 intents or of all intents of a corpus, with 10
  queries for each intent;
- work/intents/all_way.json: 1, 5, 20 and 50 examples of each of CLINC's 105 and HWU's 64 intents in random order, 20 in
  a chunk, with 20 queries for each intent. An intent with fewer than 70 texts has fewer than 50 examples.

The corpora share no text, but both have weather and music.
"""

import json
from pathlib import Path

import numpy as np
import torch
import typer
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples.research.classifiers.intent_baselines import baseline_accuracies
from examples.research.classifiers.intent_tasks import Corpus, draw_task, load_corpora, stack
from examples.research.classifiers.meta_train_intents import DATA, ENCODER, WORK, head_accuracies, training_tasks
from examples.research.classifiers.row_report import COUNTS, draw, print_table, rows_of
from examples.research.classifiers.row_training import logits_of, states, train_head
from examples.research.common.files import replacing, write_json
from examples.research.common.plots import finish, panels, save
from examples.research.common.rows import chosen, interval, print_rows, write_rows
from hf_iai import IAIConfig
from hf_iai.commands.classify import installed_encoder
from hf_iai.evaluation.calibration import expected_calibration_error
from hf_iai.evaluation.classifiers import logistic_probabilities, nearest_class_mean
from hf_iai.evaluation.random_features import kernel_discriminant, random_ridge
from hf_iai.heads import ClassRows

SHOTS, QUERIES = (1, 5, 20, 50), 20  # examples of each class
WAYS = {"10 intents": (10, 60), "all intents": (None, 10)}  # and the number of tasks, of a stream of 20 chunks
BASELINES = {
    "nearest_class_mean": nearest_class_mean,
    "kernel_discriminant": kernel_discriminant,
    "random_ridge": random_ridge,
}
Measured = tuple[float, float | None]  # accuracy and expected calibration error, in percent


def new_reader(name: str):
    base = AutoModelForSequenceClassification.from_pretrained(name)
    return get_peft_model(base, IAIConfig(task_type="SEQ_CLS", state_type="linear"))


def trained_head(name: str, corpus: Corpus, seed: int, work: Path, steps: int = 300) -> ClassRows:
    """Train on all labels of one corpus, in the same way as `meta_train_intents`; the head is kept in `work`."""
    torch.manual_seed(seed)
    head, rng = new_reader(name).base_model.core.head, np.random.default_rng(seed)
    file = work / f"after-{corpus.name}-{seed}.safetensors"
    if not file.exists():
        train_head(head, lambda most: training_tasks(rng, [corpus], (), 4, most), rng, steps=steps, lr=1e-2)
        with replacing(file) as temporary:
            save_file(head.state_dict(), temporary)
    head.load_state_dict(load_file(file))
    return head.eval()


def draw_shots(rng: np.random.Generator, corpus: Corpus, shots: int) -> tuple[np.ndarray, ...]:
    """Rows and classes of `shots` examples of each class, shuffled, and of the queries."""
    drawn = [rng.permutation(rows) for rows in corpus.rows.values()]
    examples = [rows[QUERIES : QUERIES + shots] for rows in drawn]
    said = np.repeat(np.arange(len(drawn)), [len(rows) for rows in examples])
    order = rng.permutation(len(said))
    asked = np.concatenate([rows[:QUERIES] for rows in drawn])
    return np.concatenate(examples)[order], said[order], asked, np.repeat(np.arange(len(drawn)), QUERIES)


@torch.no_grad()
def of_head(head: ClassRows, corpus: Corpus, task: tuple[np.ndarray, ...]) -> Measured:
    tasks = stack([corpus], [task])
    *_, kept = states(head, tasks)
    return measured(logits_of(head, kept, tasks.queries)[0].softmax(-1).numpy(), task[-1])


def of_baselines(corpus: Corpus, task: tuple[np.ndarray, ...]) -> dict[str, Measured]:
    rows, said, asked, targets = task
    x, queries = corpus.features[rows].numpy(), corpus.features[asked].numpy()
    found = {m: (100 * float((predict(x, said, queries) == targets).mean()), None) for m, predict in BASELINES.items()}
    return found | {"logistic_regression": measured(logistic_probabilities(x, said, queries)[1], targets)}


def measured(probabilities: np.ndarray, targets: np.ndarray) -> Measured:  # (Q, C), (Q,)
    """Accuracy and expected calibration error, in percent."""
    accuracy = (probabilities.argmax(1) == targets).mean()
    return 100 * float(accuracy), 100 * expected_calibration_error(probabilities, targets)


def with_shots(heads: list[ClassRows], corpus: Corpus, shots: int, num_draws: int, work: Path) -> dict[str, np.ndarray]:
    """method -> accuracy and calibration error (draws, 2); that of the state is the mean over training seeds.

    The baselines of each draw are kept on disk.
    """
    file, found = work / f"shots-{corpus.name}-{shots}.json", {"iai": []}
    baselines = json.loads(file.read_text()) if file.exists() else []
    for number in tqdm(range(num_draws), f"{corpus.name}, {shots} shots"):
        task = draw_shots(np.random.default_rng([2025, shots, number]), corpus, shots)
        if number == len(baselines):
            write_json([*baselines, of_baselines(corpus, task)], file, indent=None)
            baselines = json.loads(file.read_text())
        for method, values in baselines[number].items():
            found.setdefault(method, []).append(values)
        found["iai"].append(np.mean([of_head(head, corpus, task) for head in heads], 0))
    return {method: np.array(values, float) for method, values in found.items()}


def stream_tasks(corpus: Corpus, ways: int | None, num: int) -> list[tuple[Corpus, tuple[np.ndarray, ...]]]:
    rng, labels = np.random.default_rng([2026, num]), list(corpus.rows)
    chosen = [list(rng.choice(labels, ways, replace=False)) if ways else labels for _ in range(num)]
    return [(corpus, draw_task(rng, corpus, of_task)) for of_task in chosen]


def streams(heads: list[ClassRows], corpus: Corpus, work: Path) -> list[dict]:
    """Accuracy after 1 to 20 chunks, mean over training seeds, next to the refitted classifiers."""
    rows = []
    for name, (ways, num) in WAYS.items():
        drawn = stream_tasks(corpus, ways, num)
        baselines = baseline_accuracies(drawn, COUNTS, work / f"unseen-{corpus.name}-{ways}.json")
        found = {"iai": np.mean([head_accuracies(head, drawn) for head in heads], 0)}
        rows += rows_of(f"{corpus.name}, {name}", found | {m: np.array(rows) for m, rows in baselines.items()})
    return rows


def main(num_draws: int = 10, num_seeds: int = 3, data: Path = DATA, encoder: str = ENCODER, work: Path = WORK) -> None:
    name, of_streams, of_shots = installed_encoder(encoder), [], []
    command = f"research.classifiers.unseen_source --num-draws {num_draws} --num-seeds {num_seeds}"
    corpora = load_corpora(data, work, new_reader(name), AutoTokenizer.from_pretrained(name))
    for corpus, other in zip(corpora, reversed(corpora), strict=True):
        heads = [trained_head(name, other, seed, work) for seed in range(num_seeds)]
        of_streams += streams(heads, corpus, work)
        of_shots += shots_rows(heads, corpus, num_draws, work)
    write_rows(of_streams, work / "unseen_source.json", command)
    print_table(of_streams)
    draw(of_streams, list(dict.fromkeys(row["setting"] for row in of_streams)), work / "unseen_source.png")
    write_rows(of_shots, work / "all_way.json", command)
    print_rows(of_shots)
    draw_picture(of_shots, work / "all_way.png")


def shots_rows(heads: list[ClassRows], corpus: Corpus, num_draws: int, work: Path) -> list[dict]:
    rows = []
    for shots in SHOTS:
        with threadpool_limits(1):  # fits are small: more threads wait for each other
            found = with_shots(heads, corpus, shots, num_draws, work)
        for method, values in found.items():
            accuracy, error = values.T  # (draws,)
            gain = (found["iai"][:, 0] - accuracy)[:, None]
            rows.append({"corpus": corpus.name, "intents": len(corpus.rows), "shots": shots, "method": method})
            rows[-1] |= {"accuracy": accuracy.mean(), "deviation": accuracy.std(ddof=1)} | interval(gain, "gain")
            if not np.isnan(error).any():
                rows[-1] |= {"calibration_error": error.mean()}
    return rows


def draw_picture(rows: list[dict], path: Path) -> None:
    sizes = {row["corpus"]: row["intents"] for row in rows}
    figure, found = panels([f"{name}, all {size} intents" for name, size in sizes.items()], size=(4.5, 3.5))
    for axes, name in zip(found, sizes, strict=True):
        for method in ("iai", *BASELINES, "logistic_regression"):
            cells = chosen(rows, corpus=name, method=method)
            at, mean, deviation = ([r[key] for r in cells] for key in ("shots", "accuracy", "deviation"))
            axes.errorbar(at, mean, deviation, marker=".", label=method)
        axes.set(xscale="log")
        axes.set_xticks(SHOTS, SHOTS)
        finish(axes, xlabel="examples of each intent", ylabel="accuracy, %")
    save(figure, path)


if __name__ == "__main__":
    typer.run(main)
