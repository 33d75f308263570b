"""The cost of gradients and of one LoRA per task, as ratios of processor time: docs/overhead.json.

    python -m examples.benchmarks.overhead        # 3 minutes on one core

The base has 14 million random weights. Candidate and reference take turns within each repetition, on one thread. A
ratio is that of the medians; its spread shows the quartiles of the ratios of single repetitions. Measured are:

- the learned optimizer's update of one state / the gradient it needs, for one chunk of 128 tokens;
- a batch of 8 texts of 128 tokens, each with its own LoRA / the same batch with one LoRA of PEFT of equal rank and
  modules: a forward pass, and a forward and backward pass.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from examples.research.common.rows import print_rows, write_rows
from hf_iai import IAIConfig, TaskState
from hf_iai.heads import bounded
from hf_iai.signals import read_gradients

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
SHAPE |= {"vocab_size": 8192, "max_position_embeddings": 512, "tie_word_embeddings": True}
TASKS, TOKENS, RANK = 8, 128, 8
WARM_UP, REPETITIONS = 3, 20
MODULES = {"PEFT's default modules": None, "all-linear": "all-linear"}
HEAD_BAR, LORA_BAR = 0.10, 1.3
OUTPUT = Path(__file__).parents[2] / "docs" / "overhead.json"


def adapted(config):
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), config)


def gradient_model(state_type: str, modules: str | None = None):
    config = {"num_state_tokens": 16, "state_r": RANK, "state_target_modules": modules}
    return adapted(
        IAIConfig(task_type="CAUSAL_LM", regime="parametric", signal="gradients", state_type=state_type, **config)
    )


def texts(rows: int) -> torch.Tensor:  # (rows, TOKENS)
    return torch.randint(SHAPE["vocab_size"], (rows, TOKENS), generator=torch.Generator().manual_seed(0))


def state_of(model, rows: int) -> TaskState:
    """The state of `rows` tasks, each after a chunk of its own."""
    return model.adapt([{"input_ids": texts(rows)}])


def head_and_gradient(state_type: str) -> tuple[Callable, Callable]:
    model = gradient_model(state_type)
    core, base, ids = model.core, model._base, texts(1)
    state = state_of(model, 1)
    start = dict(core.state.start.items())
    theta = {name: state.tensors[name] for name in start}
    kept = {name: t for name, t in state.tensors.items() if name not in theta}

    def gradient():
        return read_gradients(base, core.state, theta, ids, torch.ones_like(ids), ids, second_order=False)

    found = gradient()

    @torch.no_grad()
    def update():
        bounded(core.head(theta, kept, found, state.step, start)[0], start)

    return update, gradient


def forward_and_backward(model, leaves: list[torch.Tensor], **inputs) -> tuple[Callable, Callable]:
    """A forward pass, and a forward and backward pass to the leaves."""

    def forward():
        with torch.no_grad():
            model(**inputs)

    def both():
        torch.autograd.grad(model(**inputs).loss, leaves)

    return forward, both


def many_loras(modules: str | None) -> tuple[Callable, Callable]:
    model, ids = gradient_model("lora", modules), texts(TASKS)
    state = state_of(model, TASKS)
    for name in model.core.state.start:
        state.tensors[name].requires_grad_()
    leaves = [t for t in state.tensors.values() if t.requires_grad]
    return forward_and_backward(model, leaves, input_ids=ids, labels=ids, task_state=state)


def one_lora(modules: str | None) -> tuple[Callable, Callable]:
    model = adapted(LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=modules))
    leaves, ids = [p for p in model.parameters() if p.requires_grad], texts(TASKS)
    return forward_and_backward(model, leaves, input_ids=ids, labels=ids, use_cache=False)


def seconds(function: Callable) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compared(name: str, bar: float | None, candidate: Callable, reference: Callable) -> dict:
    times = [
        [seconds(candidate), seconds(reference)] for _ in tqdm(range(WARM_UP + REPETITIONS), desc=name, leave=False)
    ]
    times = np.array(times[WARM_UP:])  # (repetitions, 2)
    medians = np.median(times, 0)
    low, high = np.quantile(times[:, 0] / times[:, 1], (0.25, 0.75))
    row = {"what": name, "milliseconds": 1000 * medians[0], "reference_milliseconds": 1000 * medians[1]}
    row |= {"ratio": medians[0] / medians[1], "low": low, "high": high}
    return {key: x if key == "what" else round(float(x), 4) for key, x in row.items()} | {"bar": bar}


def rows() -> list[dict]:
    found = [
        compared(f"update of a {kind} / its gradient", bar, *head_and_gradient(kind))
        for kind, bar in (("prompt", HEAD_BAR), ("lora", None))
    ]
    for name, modules in MODULES.items():
        pairs = zip(("forward", "forward and backward"), many_loras(modules), one_lora(modules), strict=True)
        found += [compared(f"{TASKS} LoRAs / one, {name}, {what}", LORA_BAR, *pair) for what, *pair in pairs]
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = rows()
    print_rows(found)
    num = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters())
    settings = {"base": SHAPE, "parameters": num, "tasks": TASKS, "tokens": TOKENS, "rank": RANK}
    settings |= {"repetitions": REPETITIONS, "cpu": torch.backends.cpu.get_cpu_capability()}
    write_rows(found, OUTPUT, "benchmarks.overhead", settings)


if __name__ == "__main__":
    typer.run(main)
