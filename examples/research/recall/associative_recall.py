"""Associative recall: the state as a memory of key/value pairs, some of them rewritten.

    python -m examples.research.recall.associative_recall base              # a base that recalls in context: 15 minutes
    python -m examples.research.recall.associative_recall train --seed 0    # an adapter: 25 minutes on one core
    python -m examples.research.recall.associative_recall evaluate          # all trained adapters

`evaluate` writes recall.json and three pictures. docs/recall.md has the results and lists the runs that they need. Each
task draws its pairs anew, so only the state can answer. Chance is 1 / 64.
"""

import json
from pathlib import Path

import numpy as np
import torch
import typer
from datasets import IterableDataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from examples.research.common.files import write_json
from examples.research.common.rows import interval, write_rows
from examples.research.common.training import train_adapter
from examples.research.recall.recall_pictures import draw_chunks, draw_sizes, draw_steps, print_table
from examples.research.recall.recall_tasks import (
    ALL_KEYS,
    CHUNK,
    NUM_KEYS,
    NUM_VALUES,
    PAIRS,
    PAIRS_PER_CHUNK,
    REWRITE_RATE,
    growing_episodes,
    key_ids,
    recall_episodes,
    value_ids,
)
from hf_iai import EpisodeCollator, IAIConfig

SLOTS, WINDOW, ASKED = 16, 512, 32
WORK = Path("work/recall")

app = typer.Typer(help=__doc__)


# ---------------------------------------------------------------- the base


def make_tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<pad>", *(f"k{i}" for i in range(ALL_KEYS)), *(f"v{i}" for i in range(NUM_VALUES))]
    words = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", model_max_length=WINDOW)


def base_batch(rng: np.random.Generator, most_keys: int) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """Text in which keys occur again with their newest value; only these values have labels.

    `most_keys` = 0 gives random symbols, repeated three times: from these a model first learns to look back.
    """
    if most_keys == 0:
        length = int(rng.integers(8, 33))
        ids = rng.integers(1, 1 + ALL_KEYS + NUM_VALUES, (4096 // (3 * length), length))
        ids = np.concatenate([ids] * 3, 1)
        return torch.from_numpy(ids), torch.from_numpy(np.where(np.arange(3 * length) < length, -100, ids))
    num = min(224, 2 * most_keys + 6)
    batch = max(8, 2048 // num)
    keys = rng.permuted(np.tile(np.arange(ALL_KEYS), (batch, 1)), axis=1)
    used = rng.integers(2, most_keys + 1, (batch, 1))
    keys = np.take_along_axis(keys, (rng.random((batch, num)) * used).astype(int), 1)  # (B, num)
    memory, rows = np.full((batch, ALL_KEYS), -1), np.arange(batch)
    values, known = np.empty_like(keys), np.empty(keys.shape, dtype=bool)
    for t in range(num):
        old = memory[rows, keys[:, t]]
        known[:, t] = (old >= 0) & (rng.random(batch) > 0.1)  # else written, or written anew
        values[:, t] = np.where(known[:, t], old, rng.integers(NUM_VALUES, size=batch))
        memory[rows, keys[:, t]] = values[:, t]
    ids = np.stack([key_ids(keys), value_ids(values)], 2)
    labels = np.where(np.stack([np.zeros_like(known), known], 2), ids, -100)
    return torch.from_numpy(ids.reshape(batch, -1)), torch.from_numpy(labels.reshape(batch, -1))


@app.command()
def base(steps: int = 2500, lr: float = 2e-3, seed: int = 0, work: Path = WORK) -> None:
    """Train a small Llama to recall in context. The number of keys grows whenever 9 of 10 answers are right."""
    set_seed(seed)
    rng = np.random.default_rng(seed)
    config = LlamaConfig(
        vocab_size=1 + ALL_KEYS + NUM_VALUES,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=WINDOW,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
    )
    most_keys, smooth = 0, 0.0
    for _ in (bar := tqdm(range(steps), mininterval=10)):
        ids, labels = base_batch(rng, most_keys)
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        asked = labels[:, 1:] != -100
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean().item()
        smooth = 0.9 * smooth + 0.1 * right
        if smooth > 0.9 and most_keys < ALL_KEYS:
            most_keys, smooth = min(ALL_KEYS, max(12, 3 * most_keys // 2)), 0.5
        bar.set_postfix(keys=most_keys, right=f"{right:.3f}", refresh=False)
    model.save_pretrained(work / "base")
    make_tokenizer().save_pretrained(work / "base")
    for num_pairs in (PAIRS, ALL_KEYS):
        tasks = recall_episodes(32, num_pairs, seed=9, num_keys=ALL_KEYS)
        print(f"full context, {num_pairs} pairs: {in_context(model.eval(), tasks).mean():.4f}")


@torch.no_grad()
def in_context(model, tasks: list[dict], num_tokens: int = WINDOW, num_asked: int = 16) -> np.ndarray:  # (E, Q)
    """Exact match of the bare base with the last `num_tokens` tokens in context, for each of `num_asked` queries."""
    right = []
    for task in tqdm(tasks, f"in context, {num_tokens} tokens", leave=False):
        context = task["support"][0]["input_ids"][-num_tokens:]
        asked = torch.tensor([query["input_ids"] for query in task["query"]])  # (Q, 2)
        asked = asked[:: max(1, len(asked) // num_asked)]
        ids = torch.cat([torch.tensor(context).expand(len(asked), -1), asked[:, :1]], 1)
        right.append((model(input_ids=ids).logits[:, -1].argmax(-1) == asked[:, 1]).numpy())
    return np.stack(right)


# ---------------------------------------------------------------- the adapter


@torch.no_grad()
def from_state(model: PeftModel, tasks: list[dict], num_chunks: int, batch_size: int = 16) -> np.ndarray:  # (E, Q)
    """Exact match with a state that read the last `num_chunks` chunks."""
    collate = EpisodeCollator(AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path), CHUNK)
    right = []
    for first in tqdm(range(0, len(tasks), batch_size), f"after {num_chunks} chunks", leave=False):
        batch = collate(tasks[first : first + batch_size])
        chunks = {name: batch[f"chunk_{name}"] for name in ("input_ids", "attention_mask", "labels")}  # (B, K, C)
        asked = batch["input_ids"].to(model.device)  # (B, Q, 2)
        total = chunks["input_ids"].shape[1]
        read = [{name: t[:, k] for name, t in chunks.items()} for k in range(total - num_chunks, total)]
        state = model.adapt(read, parallel=8) if read else model.initial_state(len(asked))
        # A state for each query.
        index = torch.arange(len(asked), device=asked.device).repeat_interleave(asked.shape[1])
        logits = model(
            input_ids=asked[..., :1].flatten(0, 1), task_state=state.map(lambda t, index=index: t[index])
        ).logits[:, -1]
        right.append((logits.argmax(-1) == asked[..., 1].flatten()).view(asked.shape[:2]).cpu().numpy())
    return np.concatenate(right)


class History(TrainerCallback):
    """Measure the exact match on separate tasks every `every` steps; keep it in a file beside the adapter."""

    def __init__(self, path: Path, num_keys: int, every: int = 100) -> None:
        self.path, self.every = path, every
        self.tasks = {rate: recall_episodes(32, PAIRS, rate, seed=5, num_keys=num_keys) for rate in (0.0, REWRITE_RATE)}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        rows = json.loads(self.path.read_text()) if self.path.exists() else []
        row = {"step": state.global_step}
        for rate, tasks in self.tasks.items():
            right = from_state(model, tasks, num_chunks=tasks[0]["num_chunks"])
            row["rewritten" if rate else "once"] = right[np.array([t["rewritten"] for t in tasks]) == (rate > 0)].mean()
        rows = [r for r in rows if r["step"] < state.global_step]  # a run that goes on from a checkpoint repeats some
        write_json([*rows, row], self.path)


def folder_of(work: Path, slots: int, keys: int, delta: bool, seed: int) -> Path:
    return work / f"m{slots}-keys{keys}-{'delta' if delta else 'average'}-{seed}"


@app.command()
def train(
    seed: int = 0,
    slots: int = SLOTS,
    keys: int = NUM_KEYS,
    delta: bool = True,
    steps: int = 1500,
    batch_size: int = 8,
    lr: float = 2e-3,
    go_on: bool = False,
    work: Path = WORK,
) -> None:
    """Train one adapter on tasks of up to 64 pairs, with and without rewrites; continue from its checkpoint.

    With --go-on, an adapter for more than 64 keys starts from the adapter for 64 keys with the same seed.
    """
    set_seed(seed)
    output = folder_of(work, slots, keys, delta, seed)
    output.mkdir(parents=True, exist_ok=True)
    config = IAIConfig(
        task_type="CAUSAL_LM",
        num_state_tokens=slots,
        delta_rule=delta,
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
    )
    if go_on:
        trained = folder_of(work, slots, NUM_KEYS, delta, seed) / "adapter"
        model = AutoPeftModelForCausalLM.from_pretrained(trained, is_trainable=True)
    else:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(work / "base"), config)
    most_chunks = round(PAIRS * (1 + REWRITE_RATE)) // PAIRS_PER_CHUNK
    tasks = IterableDataset.from_generator(
        growing_episodes,
        gen_kwargs={
            "num": steps * batch_size,
            "num_pairs": PAIRS,
            "rewrite_rate": REWRITE_RATE,
            "num_asked": ASKED,
            "seed": 1000 + seed,
            "growth": 0.0 if go_on else 0.5,
            "num_keys": keys,
        },
    )
    train_adapter(
        model,
        tasks,
        AutoTokenizer.from_pretrained(work / "base"),
        output,
        steps=steps,
        seed=seed,
        callbacks=[History(output / "history.json", keys)],
        chunk_size=CHUNK,
        min_chunks=most_chunks,  # every query may be about any chunk
        max_chunks=most_chunks,
        halve_chunks=0.0,
        scored_states="last",
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2 * steps // 5, "decay_type": "linear"},
        warmup_steps=30,
        adam_beta2=0.98,
    )


# ---------------------------------------------------------------- what it remembers


def settings_of(num_keys: int) -> dict[str, dict]:
    """The test settings of an adapter that was trained on 64 pairs, some of them rewritten."""
    if num_keys > NUM_KEYS:
        return {f"64 of {num_keys} keys": {"num_keys": num_keys}, "128 pairs": {"num_pairs": 128, "num_keys": num_keys}}
    return {"64 pairs": {}, "25% rewritten": {"rewrite_rate": REWRITE_RATE}, "100% rewritten": {"rewrite_rate": 1.0}}


def row(right: np.ndarray, counts: np.ndarray | None = None, **names) -> dict:  # (E, Q) each
    """Exact match of the selected queries, and its interval over tasks."""
    values = right.astype(float) if counts is None else np.where(counts, right, np.nan)
    return names | interval(values, "exact_match") | {"num_asked": int((~np.isnan(values)).sum())}


def rows_of_adapter(folder: Path, num_tasks: int) -> list[dict]:
    slots, keys, method, seed = folder.name.split("-")
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    rows = []
    for setting, values in settings_of(int(keys[4:])).items():
        tasks = recall_episodes(num_tasks, seed=77, **values)
        rewritten, age = (np.array([task[name] for task in tasks]) for name in ("rewritten", "age"))
        most = tasks[0]["num_chunks"]
        for n in sorted({n for n in (0, 1, 2, 4, 8, 16) if n < most} | {most}):
            right = from_state(model, tasks, n)
            names = {"setting": setting, "slots": int(slots[1:]), "method": method, "seed": int(seed), "num_chunks": n}
            rows.append(row(right, asked="all", **names))
            if n:
                rows.append(row(right, age <= n, asked="read", **names))
            if n == most and rewritten.any():
                rows.append(row(right, rewritten, asked="rewritten", **names))
    state = model.adapt([{"input_ids": torch.tensor([tasks[0]["support"][0]["input_ids"][:CHUNK]])}])
    return [r | {"state_bytes": state.nbytes} for r in rows]


def rows_of_base(model, num_tasks: int) -> list[dict]:
    """The bare base with the last m tokens in context, and with all tokens."""
    rows = []
    for num_keys in (NUM_KEYS, ALL_KEYS):
        for setting, values in settings_of(num_keys).items():
            tasks = recall_episodes(num_tasks, seed=77, **values)
            for method, tokens in (("fewer_shots", SLOTS), ("full_context", WINDOW)):
                names = {"setting": setting, "slots": SLOTS, "method": method, "num_chunks": tasks[0]["num_chunks"]}
                rows.append(row(in_context(model, tasks, tokens), asked="all", **names))
    return rows


@app.command()
def evaluate(num_tasks: int = 64, work: Path = WORK) -> None:
    """Test every adapter under `work` on tasks that no training has seen: recall.json and three pictures."""
    base = AutoModelForCausalLM.from_pretrained(work / "base").eval()
    rows = rows_of_base(base, num_tasks)
    histories = []
    for folder in tqdm(sorted(path.parent for path in work.glob("m*-keys*-*-*/adapter")), "adapters"):
        rows += rows_of_adapter(folder, num_tasks)
        histories.append({"adapter": folder.name, "history": json.loads((folder / "history.json").read_text())})
    command = f"research.recall.associative_recall evaluate --num-tasks {num_tasks} --work {work}"
    beside = {"chance": 1 / NUM_VALUES, "training": histories}
    write_rows(rows, work / "recall.json", command, {"num_tasks": num_tasks}, **beside)
    pictures(work / "recall.json", work)


@app.command()
def ages(seed: int = 0, num_tasks: int = 32, work: Path = WORK) -> None:
    """Exact match with twice the keys of training, by the age of the pair, with the delta rule full, halved and off."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder_of(work, SLOTS, ALL_KEYS, True, seed) / "adapter").eval()
    tasks = recall_episodes(num_tasks, ALL_KEYS, seed=78, num_keys=ALL_KEYS)
    age = np.array([task["age"] for task in tasks])
    write, rows = model.base_model.core.delta.write, []
    learned = [parameter.detach().clone() for parameter in write.parameters()]
    for share in (1.0, 0.5, 0.0):
        for parameter, value in zip(write.parameters(), learned, strict=True):
            parameter.data.copy_(share * value)
        right = from_state(model, tasks, tasks[0]["num_chunks"])
        groups = {f"age {n - 7}-{n}": right[(age > n - 8) & (age <= n)].mean() for n in (8, 16, 24, 32)}
        rows.append({"share_of_delta_rule": share, "all": right.mean(), **groups})
        print(rows[-1])
    command = f"research.recall.associative_recall ages --seed {seed} --num-tasks {num_tasks}"
    write_rows(rows, work / "ages.json", command)


@app.command()
def pictures(report: Path = WORK / "recall.json", output: Path = WORK) -> None:
    """Print the table of a report and draw its three pictures."""
    found = json.loads(report.read_text())
    print_table(found)
    draw_chunks(found, output / "recall.png")
    draw_sizes(found, output / "recall_size.png")
    draw_steps(found, output / "recall_steps.png")


if __name__ == "__main__":
    app()
