"""`hf-iai demo --task digits`: an adapter that was trained on synthetic tasks reads images of digits."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from ..bases.vector_base import vector_base
from ..data import chunk_vectors
from ..evaluation import Curve, evaluate_curve
from ..evaluation.extras import require_extra
from ..hub.published import published_adapter

WIDTH = 64  # pixels
CHUNK, COUNTS, DRAWS, QUERIES = 20, (1, 2, 5, 10, 20), 20, 300
METHOD = "vectors-linear"
BASELINES = ("nearest_class_mean", "nearest_neighbours", "logistic_regression", "sgd_rows", "adam_rows")

console = Console()


def run(output: Path) -> None:
    """Run all steps. The plot is written to `output`."""
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    model = load_published()
    read_digits(model)
    measure_curve(model, output / "digits.png")
    console.rule(f"done in {time.perf_counter() - started:.0f} s; see {output}")


def load_published() -> PeftModel:
    """The adapter `vectors-linear`, on a base that returns vectors as they are."""
    console.rule("1. Load the published adapter, which has seen no image")
    model = PeftModel.from_pretrained(vector_base(WIDTH), published_adapter(METHOD)).eval()
    size = sum(p.numel() for p in model.base_model.core.parameters())
    console.print(f"adapter vectors-linear: {size} parameters, trained on synthetic tasks")
    return model


def digit_episodes(num: int, num_support: int, num_queries: int, seed: int = 0) -> list[dict]:
    """Random draws of digits to read and other digits to classify, from scikit-learn's 1797 images of 8 x 8 pixels."""
    pixels, digits = require_extra("sklearn.datasets", "baselines").load_digits(return_X_y=True)
    rows = [{"vector": x, "label": str(y)} for x, y in zip(pixels / 16, digits, strict=True)]
    rng, episodes = np.random.default_rng(seed), []
    for _ in range(num):
        chosen = [rows[i] for i in rng.permutation(len(rows))[: num_support + num_queries]]
        episodes.append({"support": chosen[:num_support], "query": chosen[num_support:]})
    return episodes


def read_digits(model: PeftModel) -> None:
    """Read a stream of digits. After every chunk the state is a classifier, and no digit itself is stored."""
    console.rule(f"2. Read digits, {CHUNK} a chunk, and ask about {QUERIES} others in between")
    (episode,) = digit_episodes(1, CHUNK * COUNTS[-1], QUERIES, seed=1)
    (pixels, digits), (queries, wanted) = (
        [np.array([row[key] for row in episode[part]]) for key in ("vector", "label")] for part in ("support", "query")
    )
    table = Table("digits read", "classes met", "accuracy", "size of the state")
    for n, state in enumerate(model.adapt_steps(chunk_vectors(pixels, digits, CHUNK)), 1):
        if n in COUNTS:
            with torch.no_grad():
                best = model(inputs_embeds=torch.tensor(queries).float(), task_state=state).logits.argmax(-1)
            right = (np.array(state.label_names)[best] == wanted).mean()
            table.add_row(str(n * CHUNK), str(len(state.label_names)), f"{right:.3f}", f"{state.nbytes} bytes")
    console.print(table)


def measure_curve(model: PeftModel, plot: Path) -> Curve:
    """Measure accuracy against chunks read, beside the baselines, and print the differences to the best baseline."""
    console.rule(f"3. Next to classifiers refitted on all digits read, {DRAWS} draws")
    episodes = digit_episodes(DRAWS, CHUNK * COUNTS[-1], QUERIES)
    curve = evaluate_curve(
        model, episodes, COUNTS, BASELINES, chunk_size=CHUNK, method=METHOD, show_progress=sys.stderr.isatty()
    )
    curve.print()
    curve.plot(plot)
    best = {n: max(BASELINES, key=lambda name, n=n: curve.mean(name, n)["mean"]) for n in COUNTS}
    for n, name in best.items():
        mean, low, high = (100 * value for value in curve.difference((METHOD, n), (name, n)).values())
        console.print(f"{n:2d} chunks: {mean:+.1f} ({low:+.1f} .. {high:+.1f}) points to the best of them, {name}")
    console.print(f"plot: {plot}")
    return curve
