"""Steps to quality: a learned optimizer against tuned Adam, SGD and Meta-SGD on documents that no training has seen.

    python -m examples.research.gradients.steps_to_quality train --state prompt --seed 0    # 10 minutes on one core
    python -m examples.research.gradients.steps_to_quality evaluate --state prompt          # all trained seeds
    python -m examples.research.gradients.steps_to_quality report                           # table, verdicts, picture

For every method, update k reads chunk k of a document, and the loss is that of the text after the last chunk. n updates
read the n chunks right before that text; where there are fewer chunks, they start again with the first. `adam_few` has
only the 5 chunks right before the text, again and again: as many as the learned updates were trained on.

By default the base is the embedded one and the documents are library code. `--model FOLDER --data FOLDER --held-out
A.txt,B.txt` takes others. The rates of the baselines are the best of six on other held-out documents, chosen for every
method, start and n with the first seed. docs/gradients.md has the results.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.files import write_json
from examples.research.common.rows import write_rows
from examples.research.common.training import train_adapter
from examples.research.documents.code_curve import VALIDATION, held_out_documents, unread_documents
from examples.research.gradients.steps_report import draw, means, print_report
from hf_iai import (
    EpisodeCollator,
    IAIConfig,
    TaskState,
    embedded_base,
    episodes_from_documents,
)
from hf_iai.evaluation.losses import token_losses

CHUNK, CHUNKS, TRAINED = 64, 25, 5  # tokens, chunks of a test document, most updates in training
COUNTS = (1, 2, 5, 10, 20, 25)
CYCLED = 100  # updates of Adam that go round the chunks, from PEFT's start
CYCLES = {"adam": CHUNKS, "adam_few": TRAINED}  # how many chunks it goes round
TIMES_LEARNED = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # Meta-SGD's rates are learned ones times these
RATES = {
    "prompt": {"adam": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "sgd": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)},
    "lora": {"adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)},
}
RATES = {state: rates | {"meta_sgd": TIMES_LEARNED} for state, rates in RATES.items()}
WORK = Path("work/steps")

app = typer.Typer(help=__doc__)
Model = Annotated[str | None, typer.Option(help="Folder or Hub id of the base; the embedded one by default.")]
Data = Annotated[Path | None, typer.Option(help="Folder of .txt files; library code by default.")]
HeldOut = Annotated[str | None, typer.Option(help="The files of it to test on, joined by commas.")]


# ---------------------------------------------------------------- documents


def documents(data: Path | None, held_out: str | None, part: str) -> Iterator[dict]:
    """Documents of `part`: train, validation or test. The first quarter of a held-out book is for validation."""
    if data is None:
        if part == "train":
            yield from unread_documents()
        else:
            yield from held_out_documents(validation=part == "validation")
        return
    for file in sorted(data.glob("*.txt")):
        text = file.read_text(encoding="utf-8")
        if (file.name in held_out.split(",")) == (part != "train"):
            quarter = len(text) // 4
            cut = {"train": slice(None), "validation": slice(quarter), "test": slice(quarter, None)}[part]
            yield {"path": file.name, "text": text[cut]}


def windows(
    documents: Iterator[dict],
    tokenizer,
    num_chunks: int,
    num: int,
    seed: int,
    per_file: int | None,
    chunk_size: int = CHUNK,
) -> Dataset:
    """At most `num` windows, at most `per_file` of each document; the text that follows is as long as two chunks."""
    episodes = episodes_from_documents(
        documents,
        tokenizer,
        chunk_size=chunk_size,
        num_chunks=num_chunks,
        query_length=2 * chunk_size,
        max_per_document=per_file,
        seed=seed,
    )
    return episodes.shuffle(seed).select(range(min(num, len(episodes))))


def held_out_windows(
    data: Path | None, held_out: str | None, part: str, tokenizer, num: int, chunk_size: int
) -> Dataset:
    """Windows of `part` test or validation, each long enough for 25 updates."""
    return windows(documents(data, held_out, part), tokenizer, CHUNKS, num, 0, 2 if data is None else None, chunk_size)


# ---------------------------------------------------------------- training


def folder_of(work: Path, state: str, head: str, seed: int) -> Path:
    return work / f"{state}-{head}-{seed}"


@app.command()
def train(
    state: str = "prompt",
    head: str = "learned_optimizer",
    seed: int = 0,
    steps: int = 400,
    batch_size: int = 8,
    lr: float = 1e-3,
    state_lr: float = 3e-3,
    chunk_size: int = CHUNK,
    model: Model = None,
    data: Data = None,
    held_out: HeldOut = None,
    work: Path = WORK,
) -> None:
    """Meta-train one adapter on up to 5 updates, starting from its checkpoint if there is one."""
    set_seed(seed)
    model = model or embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = IAIConfig(
        task_type="CAUSAL_LM", regime="parametric", signal="gradients", head=head, state_type=state, num_state_tokens=16
    )
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    train_documents = documents(data, held_out, "train")
    per_file = 8 if data is None else None
    train_adapter(
        peft_model,
        windows(train_documents, tokenizer, TRAINED, steps * batch_size, seed, per_file, chunk_size),
        tokenizer,
        folder_of(work, state, head, seed),
        steps=steps,
        seed=seed,
        chunk_size=chunk_size,
        max_chunks=TRAINED,
        curriculum=0.0,
        halve_chunks=0.0,
        scored_states="last",
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        state_learning_rate=state_lr,
        lr_scheduler_type="cosine",
        warmup_steps=20,
    )


# ---------------------------------------------------------------- updates


def order(num_updates: int, cycle: int = CHUNKS) -> list[int]:
    """The chunk that each update reads, among the last `cycle` ones; the last update reads the one before the query."""
    return [CHUNKS - cycle + (k - num_updates) % cycle for k in range(num_updates)]


def chunk(batch: dict[str, Tensor], k: int) -> dict[str, Tensor]:  # (B, C) each
    return {name: batch[f"chunk_{name}"][:, k] for name in ("input_ids", "attention_mask", "labels")}


@torch.no_grad()
def query_losses(model: PeftModel, state: TaskState, text: dict[str, Tensor]) -> np.ndarray:  # (B,)
    """Loss of a text (B, T) for each task, mean over its tokens, nats per token."""
    logits = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], task_state=state).logits
    return token_losses(logits, text["labels"]).nanmean(1).numpy()


def query(batch: dict[str, Tensor]) -> dict[str, Tensor]:  # (B, T) each
    return {name: batch[name][:, 0] for name in ("input_ids", "attention_mask", "labels")}


class Descent:
    """Baseline: updates a batch of states, each with the gradient of its own chunk.

    Args:
        model: gives the loss; its head is not used.
        start: name -> (1, ...), the start of all tasks.
        tasks: B.
        make: parameters by name -> an optimizer of them.
    """

    def __init__(self, model: PeftModel, start: dict[str, Tensor], tasks: int, make: Callable) -> None:
        self.model = model
        self.theta = {name: t.repeat(tasks, *[1] * (t.dim() - 1)).requires_grad_() for name, t in start.items()}
        self.state = model.initial_state(tasks)
        self.state.tensors.update(self.theta)
        self.optimizer = make(self.theta)

    def step(self, chunk: dict[str, Tensor]) -> None:
        # A mean over the tasks' equally long chunks: times their number, each row has the gradient of its own loss.
        loss = self.model(**chunk, task_state=self.state).loss * self.state.batch_size
        self.optimizer.zero_grad()
        gradients = torch.autograd.grad(loss, list(self.theta.values()))
        for t, gradient in zip(self.theta.values(), gradients, strict=True):
            t.grad = gradient
        self.optimizer.step()


class LearnedRates(torch.optim.SGD):
    """Meta-SGD: one rate per coordinate, name -> (...), times `lr`."""

    def __init__(self, theta: dict[str, Tensor], rates: dict[str, Tensor], lr: float) -> None:
        self.rates = {theta[name]: rate for name, rate in rates.items()}
        super().__init__(theta.values(), lr)

    def step(self) -> None:
        for t, rate in self.rates.items():
            t.grad *= rate
        super().step()


def makers(method: str, meta_sgd: PeftModel | None) -> Callable[[float], Callable]:
    """rate -> (parameters by name -> an optimizer of them)."""
    if method == "adam":
        return lambda rate: lambda theta: torch.optim.Adam(theta.values(), rate)
    if method == "sgd":
        return lambda rate: lambda theta: torch.optim.SGD(theta.values(), rate)
    head = meta_sgd.base_model.core.head
    rates = {name: head.rate(name).detach() for name in head.log_rate}
    return lambda rate: lambda theta: LearnedRates(theta, rates, rate)


def peft_start(model: PeftModel, state: str, seed: int) -> dict[str, Tensor]:
    """The start of PEFT's own prompt tuning and LoRA."""
    set_seed(seed)
    base = model.active_peft_config.base_model_name_or_path
    if state == "lora":  # ours starts as PEFT's does
        config = model.active_peft_config
        fresh = IAIConfig(
            task_type="CAUSAL_LM",
            regime="parametric",
            signal="gradients",
            state_type="lora",
            state_r=config.state_r,
            state_target_modules=config.state_target_modules,
        )
        fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(base), fresh)
        return own_start(fresh)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=model.base_model.num_slots)
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    return {"prompt": fresh.prompt_encoder["default"].embedding.weight.detach().clone()[None, None, None]}


def own_start(model: PeftModel) -> dict[str, Tensor]:
    """theta(0), name -> (1, ...)."""
    tensors = model.initial_state().tensors
    return {name: tensors[name] for name in model.base_model.core.state.start}


# ---------------------------------------------------------------- evaluation


def best_rates(model, start, batch, make, rates) -> dict[int, float]:
    """n -> the rate with the lowest loss of the following text after n updates, in one pass over each document."""
    losses = {n: [] for n in COUNTS}
    for rate in tqdm(rates, "rates", leave=False):
        descent = Descent(model, start, len(batch["input_ids"]), make(rate))
        for n in range(1, CHUNKS + 1):
            descent.step(chunk(batch, n - 1))
            if n in losses:
                following = chunk(batch, n) if n < CHUNKS else query(batch)
                losses[n].append(query_losses(model, descent.state, following).mean())
    return {n: rates[int(np.nanargmin(found))] for n, found in losses.items()}


def best_cycled(model, start, batch, make, rates, cycle: int) -> float:
    """The rate with the lowest loss of the following text after 100 updates that cycle through the last chunks."""
    losses = [
        losses_of_descent(model, start, [batch], make, {CYCLED: rate}, cycle)[CYCLED].mean()
        for rate in tqdm(rates, f"rates, {cycle} chunks", leave=False)
    ]
    return rates[int(np.nanargmin(losses))]


def losses_of_descent(
    model, start, batches, make, rates: dict[int, float], cycle: int = CHUNKS
) -> dict[int, np.ndarray]:  # n -> (E,)
    losses = {}
    for n, rate in rates.items():
        found = []
        for batch in batches:
            descent = Descent(model, start, len(batch["input_ids"]), make(rate))
            for k in order(n, cycle):
                descent.step(chunk(batch, k))
            found.append(query_losses(model, descent.state, query(batch)))
        losses[n] = np.concatenate(found)
    return losses


def losses_of_reader(model, batches, counts) -> dict[int, np.ndarray]:  # n -> (E,)
    losses = {}
    for n in counts:
        found = []
        for batch in batches:
            read = [chunk(batch, k) for k in order(n)]
            state = model.adapt(read) if read else model.initial_state(len(batch["input_ids"]))
            found.append(query_losses(model, state, query(batch)))
        losses[n] = np.concatenate(found)
    return losses


def row_of(state: str, seed: int, method: str, start: str, n: int, rate: float | None, losses: np.ndarray) -> dict:
    row = {"state": state, "seed": seed, "method": method, "start": start, "num_updates": n, "rate": rate}
    return row | {"loss": float(losses.mean()), "losses": losses.round(4).tolist()}


def learned_rows(learned: PeftModel, state: str, seed: int, batches: list) -> list[dict]:
    losses = losses_of_reader(learned, batches, (0, *COUNTS, 50, CYCLED))
    return [row_of(state, seed, "learned_optimizer", "learned", n, None, values) for n, values in losses.items()]


def rows_of_seed(
    work: Path, state: str, seed: int, batches: list, validation: dict, rates: dict[tuple[str, str], dict]
) -> list[dict]:
    """Losses of all methods. Missing `rates` (by method and start) are chosen here and added."""
    learned, meta = (
        AutoPeftModelForCausalLM.from_pretrained(folder_of(work, state, head, seed) / "adapter").eval()
        for head in ("learned_optimizer", "meta_sgd")
    )
    rows = learned_rows(learned, state, seed, batches)

    def add(method: str, start: str, losses: dict[int, np.ndarray]) -> None:
        chosen = rates.get((method, start), {})
        rows.extend(row_of(state, seed, method, start, n, chosen.get(n), values) for n, values in losses.items())

    add("meta_sgd", "own", losses_of_reader(meta, batches, (0, *COUNTS)))
    starts = {"learned": own_start(learned), "peft": peft_start(learned, state, seed)}
    for name, start in starts.items():
        if name == "peft":
            add("none", name, losses_of_descent(learned, start, batches, makers("sgd", None), {0: 0.0}))
        for method in tqdm(RATES[state], f"{state}, seed {seed}, {name} start", leave=False):
            make, key = makers(method, meta), (method, name)
            if key not in rates:
                rates[key] = best_rates(learned, start, validation, make, RATES[state][method])
            add(method, name, losses_of_descent(learned, start, batches, make, rates[key]))
    return rows + cycled_rows(learned, state, seed, starts["peft"], batches, validation, rates)


def cycled_rows(model, state: str, seed: int, start, batches: list, validation: dict, rates: dict) -> list[dict]:
    """Adam's 100 updates from PEFT's start, cycling through all chunks, and through the last 5."""
    rows, make = [], makers("adam", None)
    for method, cycle in CYCLES.items():
        key = method, "cycled"
        if key not in rates:
            rates[key] = best_cycled(model, start, validation, make, RATES[state]["adam"], cycle)
        losses = losses_of_descent(model, start, batches, make, {CYCLED: rates[key]}, cycle)[CYCLED]
        rows.append(row_of(state, seed, method, "peft", CYCLED, rates[key], losses))
    return rows


def command_of(arguments: str, chunk_size: int, model: str | None, data: Path | None, held_out: str | None) -> str:
    """The command line of a run, as `recipe` takes it."""
    command = f"research.gradients.steps_to_quality {arguments} --chunk-size {chunk_size}"
    return command + (f" --model {Path(model).name} --data {data.name} --held-out {held_out}" if model else "")


@app.command()
def evaluate(
    state: str = "prompt",
    num: int = 24,
    num_validation: int = 16,
    chunk_size: int = CHUNK,
    model: Model = None,
    data: Data = None,
    held_out: HeldOut = None,
    work: Path = WORK,
) -> None:
    """Test all methods on held-out documents, for every trained seed: one JSON for each state type."""
    tokenizer = AutoTokenizer.from_pretrained(model or embedded_base())
    collate = EpisodeCollator(tokenizer, chunk_size)
    episodes = {
        part: held_out_windows(data, held_out, part, tokenizer, most, chunk_size)
        for part, most in (("test", num), ("validation", num_validation))
    }
    batches = [collate(list(rows)) for rows in _groups(episodes["test"], 20)]
    validation = collate(list(episodes["validation"]))
    command = f"evaluate --state {state} --num {num} --num-validation {num_validation}"
    command = command_of(command, chunk_size, model, data, held_out)
    chosen_on = VALIDATION if data is None else "the first quarter of each held-out book"
    settings = {"num_validation": num_validation, "validation": chosen_on}
    beside = {"model": Path(model).name if model else "embedded", "chunk_size": chunk_size, "rates": RATES[state]}
    beside |= {"state": state, "groups": list(episodes["test"]["group"])}
    rows, best = [], {}  # the rates of the first seed, for all
    for folder in sorted(work.glob(f"{state}-learned_optimizer-*/adapter")):
        rows += rows_of_seed(work, state, int(folder.parent.name.split("-")[-1]), batches, validation, best)
        write_rows(rows, work / f"{state}.json", command, settings, indent=None, **beside)


@app.command()
def guard(
    state: str = "lora",
    num: int = 24,
    chunk_size: int = CHUNK,
    model: Model = None,
    data: Data = None,
    held_out: HeldOut = None,
    work: Path = WORK,
    output: Path = WORK.parent,
) -> None:
    """Test the learned optimizer of every trained seed with and without its guard against harm: one JSON."""
    tokenizer = AutoTokenizer.from_pretrained(model or embedded_base())
    episodes = held_out_windows(data, held_out, "test", tokenizer, num, chunk_size)
    batches = [EpisodeCollator(tokenizer, chunk_size)(list(rows)) for rows in _groups(episodes, 20)]
    command = command_of(f"guard --state {state} --num {num}", chunk_size, model, data, held_out)
    name, rows = Path(model).name if model else "embedded", []
    for folder in sorted(work.glob(f"{state}-learned_optimizer-*/adapter")):
        learned = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        head, seed = learned.base_model.core.head, int(folder.parent.name.split("-")[-1])
        for guarded in (True, False):
            if not guarded:
                head.settings = replace(head.settings, doubt=1e9)
            losses = losses_of_reader(learned, batches, (0, *COUNTS, 50, CYCLED))
            rounded = {n: round(float(values.mean()), 4) for n, values in losses.items()}
            print(f"seed {seed}, guard {guarded}:", rounded)
            rows.append({"seed": seed, "guard": guarded, "losses": rounded})
    write_rows(rows, output / f"guard_{name}_{state}.json", command, model=name)


@app.command()
def report(work: Path = WORK, output: Path = WORK.parent) -> None:
    """Tables and verdicts, and for each report a picture and the means over its windows."""
    for path in sorted(work.glob("*.json")):
        found = json.loads(path.read_text())
        print_report(found)
        name = f"steps_{found['model']}_{found['state']}"
        draw(found, output / f"{name}.png")
        write_json(means(found), output / f"{name}.json")


def _groups(rows: Dataset, size: int) -> Iterator[list]:
    rows = list(rows)
    return (rows[first : first + size] for first in range(0, len(rows), size))


if __name__ == "__main__":
    app()
