"""A curve with a known optimum: random Markov chains, whose exact Bayes predictor can be computed.

    python -m examples.research.documents.markov_curve train --seed 0          # about 15 minutes on 2 cores
    python -m examples.research.documents.markov_curve evaluate --seeds 0,1,2  # work/markov/curve.json and curve.png
    python -m examples.research.documents.markov_curve evaluate --adapter adapters/markov-prefix

A chain has 8 states, its transition rows are drawn from a Dirichlet(0.5). A chunk has 64 symbols, the state 8 slots
(prefix, explicit). As text, the symbols are the letters a-h, each after a space. The measured loss is that of the next
64 symbols after n chunks. It is compared with the exact Bayes predictor that saw the same symbols, with fewer shots,
and with the state after the last chunk alone.
"""

from pathlib import Path

import numpy as np
import typer
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.hardware import has_fast_bfloat16
from examples.research.common.provenance import provenance
from examples.research.common.training import train_adapter
from hf_iai import IAIConfig, embedded_base
from hf_iai.embedded.generated_tasks import LETTERS
from hf_iai.evaluation import Curve, evaluate_curve

NUM_STATES, CHUNK, SLOTS, CONCENTRATION = 8, 64, 8, 0.5
COUNTS, MAX_CHUNKS = (0, 1, 2, 4, 8, 16, 24), 12
WORK = Path("work/markov")

app = typer.Typer(help=__doc__)


def draw_chains(num: int, length: int, seed: int) -> np.ndarray:
    """Paths (num, length), each of its own chain."""
    rng = np.random.default_rng(seed)
    cumulative = rng.dirichlet(np.full(NUM_STATES, CONCENTRATION), size=(num, NUM_STATES)).cumsum(-1)  # (N, S, S)
    symbols = np.empty((num, length), dtype=np.int64)
    symbols[:, 0] = rng.integers(NUM_STATES, size=num)
    for t in range(1, length):
        rows = cumulative[np.arange(num), symbols[:, t - 1]]
        symbols[:, t] = (rng.random(num)[:, None] > rows).sum(1).clip(max=NUM_STATES - 1)
    return symbols


def episodes(symbols: np.ndarray, tokenizer) -> Dataset:
    """The last 64 symbols of each path are the query; the symbols before them are the support."""
    letters = [tokenizer(f" {letter}")["input_ids"] for letter in LETTERS[:NUM_STATES]]
    if any(len(ids) != 1 for ids in letters):
        raise ValueError(f"each symbol must be one token, got {letters}: use the embedded base's tokenizer")
    ids = np.array(letters)[:, 0][symbols]
    example = lambda row: [{"input_ids": row.tolist()}]  # noqa: E731
    return Dataset.from_list(
        [{"support": example(r[:-CHUNK]), "query": example(r[-CHUNK:]), "group": str(i)} for i, r in enumerate(ids)]
    )


def bayes_losses(symbols: np.ndarray, num_chunks: int) -> np.ndarray:
    """Exact predictive loss (N, 63) of the query's symbols 1..63, from Dirichlet counts of all transitions seen."""
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


@app.command()
def train(
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 16,
    num_chains: int = 6000,
    lr: float = 3e-3,
    work: Path = WORK,
) -> None:
    """Train one adapter into `work/reader-SEED`, starting from its checkpoint if there is one."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    base = AutoModelForCausalLM.from_pretrained(embedded_base())
    config = IAIConfig(task_type="CAUSAL_LM", num_state_tokens=SLOTS, r=32, lora_alpha=64, target_modules="all-linear")
    model = get_peft_model(base, config)
    train_adapter(
        model,
        episodes(draw_chains(num_chains, (MAX_CHUNKS + 1) * CHUNK, seed=1000 + seed), tokenizer),
        tokenizer,
        work / f"reader-{seed}",
        steps=steps,
        seed=seed,
        chunk_size=CHUNK,
        max_chunks=MAX_CHUNKS,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        bf16=has_fast_bfloat16(),
    )


@app.command()
def evaluate(
    seeds: str = "0,1,2", adapter: Path | None = None, num: int = 256, test_seed: int = 7, work: Path = WORK
) -> None:
    """The curve of the trained seeds, or of one adapter, on chains that no training has seen."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    symbols = draw_chains(num, (max(COUNTS) + 1) * CHUNK, seed=test_seed)
    test = episodes(symbols, tokenizer)
    baselines = ("no_context", "fewer_shots", "last_chunk")
    folders = {int(s): work / f"reader-{s}" / "adapter" for s in seeds.split(",")} if adapter is None else {0: adapter}
    curves = []
    for seed, folder in folders.items():
        model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        curve = evaluate_curve(model, test, COUNTS, baselines, tokenizer=tokenizer, chunk_size=CHUNK, seed=seed)
        bayes = {("bayes", n, seed): bayes_losses(symbols, n) for n in COUNTS}
        curves.append(Curve(curve.losses | bayes, curve.groups))
    joined = Curve.concat(curves)
    joined.print()
    for n in COUNTS:
        print(f"{n:3d} chunks, above Bayes: {joined.difference(('iai', n), ('bayes', n))}")
    work.mkdir(parents=True, exist_ok=True)
    joined.plot(work / "curve.png")
    of = f"--adapter {adapter}" if adapter else f"--seeds {seeds}"
    command = f"python -m examples.research.documents.markov_curve evaluate {of} --test-seed {test_seed}"
    recipe = {"command": command, "num": num, "test_seed": test_seed}
    joined.to_json(work / "curve.json", recipe=recipe, **provenance())


if __name__ == "__main__":
    app()
