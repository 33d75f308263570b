"""100 000 chunks through one state of each type, on a tiny base: memory, time per chunk, and a resumed run bitwise.

    python -m examples.benchmarks.endurance                                # an hour on one core
    python -m examples.benchmarks.endurance --only prefix --num 20000

Every tenth of the chunks the state is saved; the last tenth is read again from the saved state, and compared bitwise.
Then the state before the last tenth and a fresh one read 500 chunks each, in turn, seven times; the medians are
compared. Times are CPU times, since other work may run beside. Memory is the resident size of the process. Writes
`work/endurance/endurance.json`.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from examples.research.common.rows import print_rows, write_rows
from hf_iai import IAIConfig, TaskState

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
TEXT = {"task_type": "CAUSAL_LM", "num_state_tokens": 4, "r": 1}
TYPES = {
    "prefix": TEXT | {"target_modules": ["q_proj"]},
    "prompt": TEXT | {"state_type": "prompt", "regime": "parametric", "target_modules": ["q_proj"]},
    "lora": TEXT
    | {
        "state_type": "lora",
        "signal": "gradients",
        "regime": "parametric",
        "state_r": 1,
        "state_target_modules": ["v_proj"],
    },
    "prefix+lora": TEXT
    | {"state_type": "prefix+lora", "regime": "parametric", "state_r": 1, "state_target_modules": ["v_proj"]},
    "linear": {"task_type": "SEQ_CLS", "state_type": "linear"},
    "mlp": {"task_type": "CAUSAL_LM", "state_type": "mlp", "regime": "parametric", "vector_width": 4, "num_outputs": 3},
}
TENTHS, CHUNK = 10, 8
TIMED, REPEATS = 500, 7  # chunks that are timed, and how often
PARALLEL = 50  # chunks that the base reads in one batch; gradients are taken one after the other all the same


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = IAIConfig(**TYPES[name])
    if name == "linear":
        base = AutoModelForSequenceClassification.from_config(BertConfig(**SIZES, num_hidden_layers=1))
    else:
        base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=64))
    return get_peft_model(base, config).eval()


def chunks(name: str, first: int, last: int) -> Iterator[dict]:
    """Chunk number i is the same in every run."""
    for number in range(first, last):
        draw = torch.Generator().manual_seed(number)
        if name in ("linear", "mlp"):
            labels = torch.randint(3, (1, CHUNK), generator=draw)
            width = SIZES["hidden_size"] if name == "linear" else TYPES["mlp"]["vector_width"]
            yield {"inputs_embeds": torch.randn(1, CHUNK, width, generator=draw) + labels[..., None], "labels": labels}
        else:
            yield {"input_ids": torch.randint(5, SIZES["vocab_size"], (1, CHUNK), generator=draw)}


def memory() -> float:
    """Resident size of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def equal(a: TaskState, b: TaskState) -> bool:
    return torch.equal(a.step, b.step) and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def milliseconds(model: torch.nn.Module, name: str, state: TaskState | None) -> float:
    """CPU time per chunk."""
    part, started = list(chunks(name, 0, TIMED)), time.process_time()
    model.adapt(part, state=state, parallel=PARALLEL)
    return 1000 * (time.process_time() - started) / TIMED


def endure(name: str, num: int, folder: Path) -> dict:
    model, state, sizes = model_of(name), None, []
    for tenth in tqdm(range(TENTHS), name, disable=None):
        part = chunks(name, tenth * num // TENTHS, (tenth + 1) * num // TENTHS)
        state = model.adapt(part, state=state, parallel=PARALLEL)
        sizes.append(memory())
        if tenth < TENTHS - 1:
            state.save_pretrained(folder / name)
    saved = TaskState.from_pretrained(folder / name)
    resumed = model.adapt(chunks(name, (TENTHS - 1) * num // TENTHS, num), state=saved, parallel=PARALLEL)
    return {
        "state": name,
        "chunks": num,
        **ages(model, name, saved),
        "MB, first tenth": sizes[0],
        "MB, last tenth": sizes[-1],
        "finite": all(bool(t.isfinite().all()) for t in state.tensors.values()),
        "resumed bitwise": equal(resumed, state),
    }


def ages(model: torch.nn.Module, name: str, saved: TaskState) -> dict[str, float]:
    """Time per chunk of a fresh state and of one that has read long, measured in turn."""
    found = {"ms, fresh state": [], "ms, old state": []}
    for _ in range(REPEATS):
        for state, times in zip((None, saved), found.values(), strict=True):
            times.append(milliseconds(model, name, state))
    return {age: median(times) for age, times in found.items()}


def main(
    num: Annotated[int, typer.Option(help="Chunks.")] = 100_000,
    only: Annotated[str, typer.Option(help="Types with commas between them; all by default.")] = "",
    work: Path = Path("work/endurance"),
) -> None:
    rows = []
    for name in [name for name in TYPES if not only or name in only.split(",")]:
        rows.append(endure(name, num, work))
        write_rows(rows, work / "endurance.json", "benchmarks.endurance", {"num": num})
    print_rows(rows)


if __name__ == "__main__":
    typer.run(main)
