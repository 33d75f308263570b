"""The cost of one more chunk as a stream of labelled texts grows, next to refitting logistic regression.

    python -m examples.benchmarks.growth --data FOLDER    # 2 minutes on one core; docs/growth.json and docs/growth.png

FOLDER holds `clinc105`; its 105 intents are read in random order, 20 examples in a chunk. Two sizes grow: the examples
(20 to 5000, of 20 and of 100 intents), and the classes (5 to 100, at 500 examples). Times are processor seconds of one
thread, the median of 5. They exclude the encoder, which costs both sides the same and is measured separately.

    seconds              read the chunk and make the classifier rows
    refit                fit logistic regression to all features so far (C = 10; cross-validation would cost 13 fits)
    bytes                size of the state
    bytes_of_examples    size of the features that refitting has to keep
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from examples.research.classifiers.intent_tasks import load_corpora
from examples.research.classifiers.row_training import CHUNK
from examples.research.common.files import write_json
from examples.research.common.plots import draw_curve, finish, panels, save
from examples.research.common.provenance import provenance
from examples.research.common.rows import chosen, print_rows
from hf_iai.commands.classify import load_reader
from hf_iai.evaluation.accuracy import features_of
from hf_iai.hub.published import published_adapter

SIZES, CLASSES = (20, 100, 500, 1000, 2000, 5000), (5, 20, 50, 100)
STREAMS = [(20, SIZES[:-1]), (100, SIZES), *((c, (500,)) for c in CLASSES if c not in (20, 100))]
REPETITIONS = 5
OUTPUT = Path(__file__).parents[2] / "docs"


def stream(corpus, num_classes: int, num_examples: int) -> tuple[torch.Tensor, torch.Tensor]:  # (S, d), (S,)
    rng = np.random.default_rng(0)
    labels = rng.permutation(sorted(corpus.rows))[:num_classes]
    rows = np.concatenate([corpus.rows[label] for label in labels])
    classes = np.repeat(np.arange(num_classes), [len(corpus.rows[label]) for label in labels])
    # The first chunks hold every class if they can, so that the number of classes does not grow with the examples.
    order = rng.permutation(len(rows))
    first = [int(order[classes[order] == c][0]) for c in range(num_classes)]
    order = np.array(first + [i for i in order if i not in set(first)])[:num_examples]
    return corpus.features[rows[order]], torch.from_numpy(classes[order])


def seconds(function) -> float:
    found = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return float(np.median(found))


@torch.no_grad()
def rows_of_stream(head, corpus, num_classes: int, sizes: tuple[int, ...]) -> list[dict]:
    x, y = stream(corpus, num_classes, max(sizes))
    kept, rows = head.initial(1, num_classes, x.shape[1]), []
    for start in tqdm(range(0, len(x), CHUNK), f"{num_classes} classes"):
        before, part = kept, slice(start, start + CHUNK)
        chunk = x[None, part], y[None, part]
        kept = head(before, *chunk)
        read = start + CHUNK
        if read not in sizes:
            continue
        model = LogisticRegression(C=10.0, max_iter=1000)
        rows.append(
            {
                "classes": num_classes,
                "examples": read,
                "seconds": seconds(lambda before=before, chunk=chunk: head.rows(head(before, *chunk))),
                "refit": seconds(lambda model=model, read=read: model.fit(x[:read].numpy(), y[:read].numpy())),
                "bytes": sum(t.numel() * t.element_size() for t in kept.values()),
                "bytes_of_examples": read * x.shape[1] * 4,
            }
        )
    return rows


def encoder_seconds(model, tokenizer) -> float:
    """Processor seconds to embed one chunk of 20 texts of 12 words."""

    inputs = tokenizer(["please tell me what the weather will be like in london tomorrow"] * CHUNK, return_tensors="pt")
    return seconds(lambda: features_of(model, inputs))


def draw(rows: list[dict], path: Path) -> None:
    figure, (axes,) = panels([""], size=(6, 4))
    for color, classes in enumerate((20, 100)):
        own = chosen(rows, classes=classes)
        at, read, refit = ([row[name] for row in own] for name in ("examples", "seconds", "refit"))
        draw_curve(axes, at, read, color=f"C{color}", marker="o", label=f"one more chunk, {classes} classes")
        label = f"logistic regression, {classes} classes"
        draw_curve(axes, at, refit, color=f"C{color}", linestyle="--", label=label)
    labels = {"xlabel": "examples read", "ylabel": "processor seconds, one thread"}
    finish(axes, fontsize=10, xscale="log", yscale="log", **labels)
    save(figure, path, dpi=110)


def main(
    data: Annotated[Path, typer.Option(help="Folder with clinc105.")],
    adapter: str = "minilm-linear",
    work: Path = Path("work/intents"),
    output: Path = OUTPUT,
) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_reader(published_adapter(adapter))
    corpus = load_corpora(data, work, model, tokenizer)[0]
    head = model.base_model.core.head
    with threadpool_limits(1):
        rows = [row for stream in STREAMS for row in rows_of_stream(head, corpus, *stream)]
        report = {"encoder_seconds": encoder_seconds(model, tokenizer), "rows": rows, "recipe": provenance()}
    print_rows(rows)
    write_json(report, output / "growth.json")
    draw(rows, output / "growth.png")


if __name__ == "__main__":
    typer.run(main)
