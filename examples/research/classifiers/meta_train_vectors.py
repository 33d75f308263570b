"""Classify vectors by reading: train on synthetic tasks only, test on real digits.

    for seed in 0 1 2; do
        python -m examples.research.classifiers.meta_train_vectors train --seed $seed    # 1 minute each
    done
    python -m examples.research.classifiers.meta_train_vectors evaluate     # a table, docs/digits.json, docs/digits.png

Training sees no image and no real data: `vector_tasks.py` draws its tasks. Evaluation reads scikit-learn's 1797 digits
of 8 x 8 pixels, 20 in a chunk, and compares with classifiers that are fitted to all digits read so far.
"""

from pathlib import Path

import numpy as np
import torch
import typer
from peft import PeftModel, get_peft_model
from threadpoolctl import threadpool_limits

from examples.research.classifiers.row_report import COUNTS, draw, print_table, rows_of
from examples.research.classifiers.row_training import CHUNK, MOST_CHUNKS, train_head
from examples.research.classifiers.vector_tasks import training_tasks
from examples.research.common.rows import write_rows
from hf_iai import IAIConfig, evaluate_curve, vector_base
from hf_iai.commands.demo_digits import WIDTH, digit_episodes
from hf_iai.evaluation.classifiers import CLASSIFIERS

WORK, DOCS = Path("work/vectors"), Path(__file__).parents[3] / "docs"

app = typer.Typer(help=__doc__)


@app.command()
def train(seed: int = 0, steps: int = 400, batch_size: int = 8, lr: float = 1e-2, work: Path = WORK) -> None:
    """Train one adapter on synthetic tasks."""
    torch.manual_seed(seed)
    model = get_peft_model(vector_base(WIDTH), IAIConfig(task_type="SEQ_CLS", state_type="linear"))
    rng = np.random.default_rng([seed, 64])
    head = model.base_model.core.head
    train_head(head, lambda most: training_tasks(rng, batch_size, most, WIDTH), rng, steps=steps, lr=lr)
    model.save_pretrained(work / f"seed-{seed}", save_embedding_layers=False)


@app.command()
def evaluate(seeds: str = "0,1,2", num: int = 60, work: Path = WORK, output: Path = DOCS) -> None:
    """Test every adapter on `num` draws of digits to read and digits to classify: docs/digits.json and digits.png."""
    episodes = digit_episodes(num, CHUNK * MOST_CHUNKS, num_queries=500, seed=2024)
    found, baselines = {}, list(CLASSIFIERS)
    with threadpool_limits(1):  # fits are small: more threads wait for each other
        for seed in map(int, seeds.split(",")):
            model = PeftModel.from_pretrained(vector_base(WIDTH), work / f"seed-{seed}").eval()
            curve = evaluate_curve(model, episodes, COUNTS, baselines, chunk_size=CHUNK)
            for method in curve.methods:
                of_counts = [curve.losses[method, n, 0].mean(1) for n in COUNTS]
                found[f"seed {seed}" if method == "iai" else method] = np.stack(of_counts, 1)
            baselines = []  # they do not depend on the adapter
    runs = {name: found.pop(name) for name in list(found) if name.startswith("seed ")}
    rows = rows_of("digits", {"iai": np.mean(list(runs.values()), 0)} | found)
    for name, accuracy in runs.items():
        rows += rows_of(f"digits, {name}", {"iai": accuracy} | found)
    command = f"research.classifiers.meta_train_vectors evaluate --seeds {seeds} --num {num}"
    write_rows(rows, output / "digits.json", command)
    print_table(rows)
    draw(rows, ["digits"], output / "digits.png")


if __name__ == "__main__":
    app()
