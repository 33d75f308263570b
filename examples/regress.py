"""Linear regression by reading: a state of fixed size predicts real numbers after every chunk of examples.

    python regress.py
    python regress.py --noise 1.0

Untrained, the state is ridge regression with a small fixed penalty. A short training on other regressions teaches it
how large the penalty should be. Here it is compared with ridge regression that keeps all examples and chooses its
penalty by leave-one-out cross-validation. Everything runs on given vectors, so no base has to be downloaded. Takes
about 20 seconds on a CPU.
"""

import numpy as np
import torch
import typer
from peft import get_peft_model

from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments, chunk_vectors, vector_base

WIDTH, CHUNK_SIZE, COUNTS = 16, 20, (1, 2, 4, 8, 16)  # features, examples in a chunk, chunks after which to compare


def draw_task(rng: np.random.Generator, num: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, targets and targets without noise of one regression. Put your own data here."""
    weights = rng.normal(size=WIDTH) * (rng.random(WIDTH) < 0.5) / WIDTH**0.5
    x = rng.normal(size=(num, WIDTH))
    y = x @ weights + 1
    return x, y + noise * rng.normal(size=num), y


def ridge(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Refitted to all examples; the penalty, one of eight, by leave-one-out cross-validation."""
    x_mean, y_mean = x.mean(0), y.mean()
    x, y, found = x - x_mean, y - y_mean, []
    for penalty in 10.0 ** np.arange(-4, 4):
        solve = np.linalg.solve(x.T @ x + penalty * np.eye(WIDTH), x.T)
        left_out = (y - x @ (solve @ y)) / (1 - (x @ solve).diagonal() - 1 / len(x))
        found.append((np.square(left_out).mean(), solve @ y))
    return (queries - x_mean) @ min(found, key=lambda pair: pair[0])[1] + y_mean


def main(noise: float = 0.5, steps: int = 100, num_test: int = 30) -> None:
    torch.manual_seed(0)
    config = IAIConfig(task_type="SEQ_CLS", state_type="linear", likelihood="gaussian")
    model = get_peft_model(vector_base(WIDTH), config)

    # Training tasks: other regressions, with other noise. An episode has examples to read and queries to predict.
    episodes, num = [], CHUNK_SIZE * 8
    for seed in range(400):
        rng = np.random.default_rng([1, seed])
        x, y, _ = draw_task(rng, num + 20, rng.choice([0.1, 0.5, 1.0]))
        rows = [{"vector": vector.tolist(), "label": float(target)} for vector, target in zip(x, y, strict=True)]
        episodes.append({"support": rows[:num], "query": rows[num:]})
    args = IAITrainingArguments(
        output_dir="my-regression",
        max_steps=steps,
        chunk_size=CHUNK_SIZE,
        learning_rate=1e-2,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    IAITrainer(model=model, args=args, train_dataset=episodes).train()
    model.eval()

    # New tasks: the squared error above the noise, after each count of chunks.
    errors = {(name, count): [] for name in ("hf_iai", "ridge") for count in COUNTS}
    for seed in range(num_test):
        x, y, exact = draw_task(np.random.default_rng([2, seed]), 200 + CHUNK_SIZE * COUNTS[-1], noise)
        queries, wanted, x, y = x[:200], exact[:200], x[200:], y[200:]
        for count, state in enumerate(model.adapt_steps(chunk_vectors(x, y, CHUNK_SIZE)), 1):
            if count in COUNTS:
                with torch.no_grad():
                    means = model(inputs_embeds=torch.tensor(queries).float(), task_state=state).logits[:, 0].numpy()
                fitted = ridge(x[: count * CHUNK_SIZE], y[: count * CHUNK_SIZE], queries)
                errors["hf_iai", count].append(np.square(means - wanted).mean())
                errors["ridge", count].append(np.square(fitted - wanted).mean())
    print(f"squared error above the noise, mean of {num_test} new tasks; the state has {state.nbytes} bytes")
    print("examples read    hf_iai     ridge, refitted to all examples")
    for count in COUNTS:
        own, other = (np.mean(errors[name, count]) for name in ("hf_iai", "ridge"))
        print(f"{count * CHUNK_SIZE:13d}    {own:.4f}     {other:.4f}")


if __name__ == "__main__":
    typer.run(main)
