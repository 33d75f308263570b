"""The exact curve: random Markov chains, where the Bayes predictor is known.

    python examples/markov_curve.py --seed 0 --output work/markov-0              # trains (about 15 minutes), evaluates
    python examples/markov_curve.py --adapter adapters/markov-prefix             # evaluates the published adapter

8 states, rows drawn from a Dirichlet(0.5), chunks of 64 symbols, m = 8 slots, prefix, explicit. The text form is the
letters a-h with one space before each. Loss of the next 64 symbols after n chunks, next to the exact Bayes predictor
that saw the same symbols, to fewer shots and to the last chunk alone.
"""

from pathlib import Path

import numpy as np
import torch
import typer
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments, embedded_base
from hf_iai.embedded.generated_tasks import LETTERS
from hf_iai.evaluation import Curve, evaluate_curve

NUM_STATES, CHUNK, SLOTS, CONCENTRATION = 8, 64, 8, 0.5
COUNTS = (0, 1, 2, 4, 8, 16, 24)


def draw_chains(num: int, length: int, seed: int) -> np.ndarray:
    """`num` paths of `length` symbols, each of a chain of its own: (num, length)."""
    rng = np.random.default_rng(seed)
    cumulative = rng.dirichlet(np.full(NUM_STATES, CONCENTRATION), size=(num, NUM_STATES)).cumsum(-1)  # (N, S, S)
    symbols = np.empty((num, length), dtype=np.int64)
    symbols[:, 0] = rng.integers(NUM_STATES, size=num)
    for t in range(1, length):
        rows = cumulative[np.arange(num), symbols[:, t - 1]]
        symbols[:, t] = (rng.random(num)[:, None] > rows).sum(1).clip(max=NUM_STATES - 1)
    return symbols


def episodes(symbols: np.ndarray, tokenizer) -> Dataset:
    """The last 64 symbols of each path are the query, those before them the support."""
    letters = [tokenizer(f" {letter}")["input_ids"] for letter in LETTERS[:NUM_STATES]]
    if any(len(ids) != 1 for ids in letters):
        raise ValueError(f"each symbol must be one token, got {letters}: use the embedded base's tokenizer")
    ids = np.array(letters)[:, 0][symbols]
    example = lambda row: [{"input_ids": row.tolist()}]  # noqa: E731
    return Dataset.from_list(
        [{"support": example(r[:-CHUNK]), "query": example(r[-CHUNK:]), "group": str(i)} for i, r in enumerate(ids)]
    )


def bayes_losses(symbols: np.ndarray, num_chunks: int) -> np.ndarray:
    """Exact predictive loss of the query's symbols 1..63, (N, 63): Dirichlet counts of all transitions seen."""
    num, start = len(symbols), symbols.shape[1] - CHUNK
    counts, rows = np.full((num, NUM_STATES, NUM_STATES), CONCENTRATION), np.arange(num)
    losses = []
    for t in range(start - num_chunks * CHUNK + 1, symbols.shape[1]):
        before, now = symbols[:, t - 1], symbols[:, t]
        if t > start:
            seen = counts[rows, before]
            losses.append(-np.log(seen[rows, now] / seen.sum(-1)))
        # The query starts a new sequence: the step from the last support symbol to it is in no method's text.
        if t != start:
            counts[rows, before, now] += 1
    return np.stack(losses, 1)


def train(output: Path, seed: int, steps: int, batch_size: int, max_chunks: int, lr: float):
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    model = AutoModelForCausalLM.from_pretrained(embedded_base())
    config = IAIConfig(task_type="CAUSAL_LM", num_state_tokens=SLOTS, r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, config)
    symbols = draw_chains(steps * batch_size, (max_chunks + 1) * CHUNK, seed=1000 + seed)
    args = IAITrainingArguments(
        output_dir=str(output / "trainer"),
        chunk_size=CHUNK,
        max_chunks=max_chunks,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        seed=seed,
        report_to=[],
    )
    trainer = IAITrainer(model, args, train_dataset=episodes(symbols, tokenizer), processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(output / "adapter")
    return model.eval(), tokenizer


def evaluate(model, tokenizer, seed: int, num: int) -> Curve:
    symbols = draw_chains(num, (max(COUNTS) + 1) * CHUNK, seed=7)  # one test set for every training seed
    baselines = ("no_context", "fewer_shots", "last_chunk")
    curve = evaluate_curve(
        model, episodes(symbols, tokenizer), COUNTS, baselines, tokenizer=tokenizer, chunk_size=CHUNK, seed=seed
    )
    for n in COUNTS:
        curve.losses["bayes", n, seed] = bayes_losses(symbols, n)
    return curve


def main(
    output: Path = Path("work/markov"),
    adapter: Path | None = None,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 16,
    max_chunks: int = 12,
    lr: float = 2e-3,
    num_eval: int = 256,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if adapter is None:
        model, tokenizer = train(output, seed, steps, batch_size, max_chunks, lr)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
        tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    curve = evaluate(model, tokenizer, seed, num_eval)
    curve.print()
    curve.plot(output / "curve.png")
    recipe = {"steps": steps, "batch_size": batch_size, "max_chunks": max_chunks, "lr": lr, "num_eval": num_eval}
    curve.to_json(output / "curve.json", recipe=recipe, torch=torch.__version__)


if __name__ == "__main__":
    typer.run(main)
