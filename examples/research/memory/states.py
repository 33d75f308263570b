"""What every state type does to a real base before any training: loss of the next chunk after 0, 1, 4 and 8 chunks.

    python -m examples.research.memory.states --base .bases/SmolLM2-135M-Instruct    # 20 minutes on two cores

Writes `work/memory/states.json`.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.rows import print_rows, write_rows
from examples.research.memory import texts
from hf_iai import IAIConfig

COUNTS = (0, 1, 4, 8)
LORA = {"state_type": "lora", "signal": "gradients"}
STATES = {
    "prefix, recent, 64 slots": {"accumulation": "recent", "num_state_tokens": 64},
    "prefix, average, 64 slots": {"num_state_tokens": 64},
    "prefix, average, 56 of 64 kept": {"num_state_tokens": 64, "num_kept_tokens": 56},
    "the same, 63 of 64 kept, no correction": {"num_state_tokens": 64, "num_kept_tokens": 63, "correction": False},
    "prefix, signal both, 16 slots": {"signal": "both", "num_state_tokens": 16},
    "prefix, attention, 64 slots": {"accumulation": "attention", "num_state_tokens": 64},
    "prompt, 16 slots": {"state_type": "prompt", "num_state_tokens": 16},
    "lora, gradients, defaults": LORA,
    "lora, gradients, sgd, all linear": LORA | {"head": "sgd", "state_target_modules": "all-linear"},
    "lora, gradients, normalized, all linear": LORA | {"head": "normalized", "state_target_modules": "all-linear"},
    "prefix+lora, 64 slots": {"state_type": "prefix+lora", "num_state_tokens": 64},
}


def main(
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 256,
    num: Annotated[int, typer.Option(help="Windows of unseen packages.")] = 2,
    work: Path = Path("work/memory"),
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    drawn = texts.windows(texts.packages(validation=False), tokenizer, (COUNTS[-1] + 1) * size, num, seed=1)
    windows = [torch.tensor([text.ids]) for text in drawn]
    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        none = [float(bare(ids[:, -size:], labels=ids[:, -size:]).loss) for ids in windows]
    rows = [{"state": "no state", **{f"after {n}": sum(none) / num for n in COUNTS}}]
    for name, values in tqdm(STATES.items(), disable=None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, IAIConfig(task_type="CAUSAL_LM", **values)).eval()
        found = [losses(model, ids, size) for ids in windows]
        rows.append({"state": name, **{f"after {n}": sum(f[n] for f in found) / num for n in COUNTS}})
        write_rows(rows, work / "states.json", "research.memory.states", {"base": base, "size": size, "num": num})
    print_rows(rows)


@torch.no_grad()
def losses(model, ids: torch.Tensor, size: int) -> dict[int, float]:
    """The loss of the last chunk, after the n chunks right before it."""
    *chunks, query = ids.split(size, 1)
    found = {}
    for n in COUNTS:
        state = model.adapt({"input_ids": chunk} for chunk in chunks[-n:]) if n else model.initial_state()
        found[n] = float(model(input_ids=query, labels=query, task_state=state).loss)
    return found


if __name__ == "__main__":
    typer.run(main)
