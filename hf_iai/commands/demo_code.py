"""`hf-iai demo`: a tour in short steps, one function each, in less than four minutes on two cores."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from ..config import IAIConfig
from ..data import chunk_text, episodes_from_documents
from ..embedded import EMBEDDED_NAME, embedded_base, library_documents
from ..embedded.generated_tasks import markov_chain, markov_symbols, symbols_to_text
from ..evaluation import evaluate_curve
from ..hub.published import published_adapter
from ..model import IAIModel
from ..state import TaskState
from ..trainer import IAITrainer
from ..training_args import IAITrainingArguments
from .losses import print_losses

LARGE = 20e6  # parameters; a base with more is measured on fewer texts
COUNTS, NUM_TEXTS = (0, 1, 2, 4, 8, 16), 32
COUNTS_IF_LARGE, NUM_TEXTS_IF_LARGE = (0, 1, 2, 4, 8), 4
MARKOV_CHUNK = 64  # symbols, one token each
MARKOV_CHUNKS = 4
TRAINING_SECONDS = 60
PACKAGES = ["http", "json", "logging", "multiprocessing", "unittest", "xml"]  # the embedded base has seen none of them
READ_PACKAGE = "json"

console = Console()


def run(output: Path, base: str = EMBEDDED_NAME) -> None:
    """Run all steps. The plot, the saved state and the trained adapter are written to `output`.

    Args:
        output: a folder.
        base: Hub id or folder of the base. An adapter is trained on the embedded one only.
    """
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_memory(base)
    state, continuation = read_package(model, tokenizer)
    measure_curve(model, tokenizer, output / "curve.png")
    generate_with_and_without(model, tokenizer, state, continuation)
    save_and_reload(model, state, continuation, output / "state")
    if base == EMBEDDED_NAME:
        train_fresh_adapter(tokenizer, output / "fresh_adapter")
    console.rule(f"done in {time.perf_counter() - started:.0f} s; see {output}")


def load_memory(base: str) -> tuple[IAIModel, PreTrainedTokenizerBase]:
    """A base with a memory: slots for what was just said, and fast weights for what the text is like.

    That of the embedded base was trained on other packages; any other base gets an untrained one.
    """
    folder = embedded_base() if base == EMBEDDED_NAME else base
    if base == EMBEDDED_NAME:
        console.rule("1. Load the base, with the memory 'code-memory', trained on other packages")
        model = AutoPeftModelForCausalLM.from_pretrained(published_adapter("code-memory")).eval()
    else:
        console.rule("1. Load the base, and give it a memory; nothing is trained")
        torch.manual_seed(0)
        config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    console.print(
        f"base: {num_parameters(model) / 1e6:.1f}M parameters, window {model.window} tokens\n"
        f"memory: {model.num_slots} slots, and fast weights of rank {model.active_peft_config.state_r}"
    )
    return model, AutoTokenizer.from_pretrained(folder)


def num_parameters(model: IAIModel) -> int:
    """Of the base alone."""
    return sum(p.numel() for name, p in model.named_parameters() if ".default." not in name)


def read_package(model: IAIModel, tokenizer: PreTrainedTokenizerBase) -> tuple[TaskState, dict[str, torch.Tensor]]:
    """Read the beginning of a package except its last chunk. Returns the state and that chunk."""
    console.rule(f"2. Read the package {READ_PACKAGE!r}, chunk by chunk")
    texts = (document["text"] for document in library_documents("held_out", packages=[READ_PACKAGE]))
    chunks = chunk_text("".join(texts), tokenizer, model=model)
    whole = [chunk for chunk in chunks if chunk["input_ids"].shape[1] == model.usual_chunk_size]
    *chunks, last = whole[: COUNTS[-1] + 1] if num_parameters(model) > LARGE else whole
    losses = []
    state = model.adapt(
        chunks, show_progress=sys.stderr.isatty(), on_step=lambda state: losses.append(float(state.tensors["loss"]))
    )
    half = len(losses) // 2
    console.print(
        f"{int(state.num_tokens)} tokens read in {int(state.step)} chunks; the state holds {state.nbytes} bytes\n"
        f"loss of each chunk before it was learned from: {np.mean(losses[:half]):.3f} in the first half, "
        f"{np.mean(losses[half:]):.3f} in the second"
    )
    return state, last


def measure_curve(model: IAIModel, tokenizer: PreTrainedTokenizerBase, plot: Path) -> None:
    """Measure the loss of the next chunk against the number of chunks read, beside the baselines."""
    console.rule("3. What reading gained: the same next chunk, after more and more chunks before it")
    large = num_parameters(model) > LARGE
    counts, num = (COUNTS_IF_LARGE, NUM_TEXTS_IF_LARGE) if large else (COUNTS, NUM_TEXTS)
    episodes = episodes_from_documents(
        library_documents("held_out", packages=PACKAGES),
        tokenizer,
        chunk_size=model.usual_chunk_size,
        num_chunks=counts[-1],
        max_per_document=2,
    )
    episodes = episodes.shuffle(seed=0).select(range(min(num, len(episodes))))
    curve = evaluate_curve(
        model,
        episodes,
        num_chunks=counts,
        tokenizer=tokenizer,
        batch_size=4 if large else 16,
        method="memory",
        show_progress=sys.stderr.isatty(),
    )
    curve.print()
    curve.plot(plot)
    console.print(f"plot: {plot}")


def generate_with_and_without(
    model: IAIModel, tokenizer: PreTrainedTokenizerBase, state: TaskState, continuation: dict[str, torch.Tensor]
) -> None:
    """Continue the same prompt with the bare base, and with the model that has read the package."""
    console.rule("4. Continue the package's last lines")
    prompt = {
        name: continuation[name][:, : continuation[name].shape[1] // 4] for name in ("input_ids", "attention_mask")
    }
    length = prompt["input_ids"].shape[1]
    console.print(Panel(Text(tokenizer.decode(prompt["input_ids"][0])), title="prompt"))

    def show(title: str, **under) -> None:
        tokens = model.generate(**prompt, **under, max_new_tokens=48, do_sample=False)[0, length:]
        with torch.no_grad():
            loss = float(model(**continuation, **under).loss)
        text = Text(tokenizer.decode(tokens, skip_special_tokens=True))
        console.print(Panel(text, title=f"{title}: loss of the real text {loss:.3f}"))

    with model.disable_adapter():
        show("base, without the state")
    show("with the state", task_state=state)


def save_and_reload(model: IAIModel, state: TaskState, query: dict[str, torch.Tensor], folder: Path) -> None:
    """Save the state, a folder with a config and safetensors, load it, and check that it is the same bit for bit."""
    console.rule("5. Save the state and load it again")
    state.save_pretrained(folder)
    loaded = TaskState.from_pretrained(folder)
    with torch.no_grad():
        difference = (model(**query, task_state=state).logits - model(**query, task_state=loaded).logits).abs().max()
    equal = all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in state.tensors.items())
    console.print(f"{folder}: tensors equal: {equal}; largest difference of the logits: {float(difference)}")
    if not equal or difference:
        raise RuntimeError(f"the state saved in {folder} came back changed (largest difference {float(difference)})")


class StopAfter(TrainerCallback):
    """Ends training after `seconds`, so that it takes no longer on a slow machine."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.deadline = time.perf_counter() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.perf_counter() > self.deadline


def train_fresh_adapter(tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Train a new adapter for about a minute: its state has to carry what it read of a random Markov chain."""
    console.rule(f"6. Train an adapter for {TRAINING_SECONDS} s: random Markov chains, a new one per episode")
    torch.manual_seed(0)
    config = IAIConfig(task_type="CAUSAL_LM", num_state_tokens=8, r=32, lora_alpha=64, target_modules="all-linear")
    trainer = IAITrainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base()), config),
        args=IAITrainingArguments(
            output_dir=str(output),
            max_chunks=MARKOV_CHUNKS,
            chunk_size=MARKOV_CHUNK,
            max_steps=100,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            save_strategy="no",
            logging_steps=25,
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_pin_memory=False,  # pinned memory is of use only with an accelerator
        ),
        train_dataset=markov_episodes(tokenizer, 1000, seed=0),
        eval_dataset=markov_episodes(tokenizer, 48, seed=1),
        processing_class=tokenizer,
        callbacks=[StopAfter(TRAINING_SECONDS)],
    )
    print_losses(trainer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.model.save_pretrained(output)
    print_before_and_after(before, after)


def markov_episodes(tokenizer: PreTrainedTokenizerBase, num_episodes: int, seed: int) -> Dataset:
    """Episodes with a new 8-state chain each: `MARKOV_CHUNKS` chunks to read, then the symbols to predict."""
    rng = np.random.default_rng(seed)
    length = (MARKOV_CHUNKS + 1) * MARKOV_CHUNK
    texts = [symbols_to_text(markov_symbols(rng, markov_chain(rng, 8), length)) for _ in range(num_episodes)]
    return episodes_from_documents(texts, tokenizer, chunk_size=MARKOV_CHUNK, num_chunks=MARKOV_CHUNKS, seed=seed)


def print_before_and_after(before: dict[str, float], after: dict[str, float]) -> None:
    prefix = "eval_loss_at_chunks_"
    counts = sorted(int(name.removeprefix(prefix)) for name in after if name.startswith(prefix))
    table = Table("loss of chains never seen, after", *(f"{n} chunks" for n in counts))
    for name, metrics in (("before training", before), ("after training", after)):
        table.add_row(name, *(f"{metrics[f'{prefix}{n}']:.3f}" for n in counts))
    console.print(table)
