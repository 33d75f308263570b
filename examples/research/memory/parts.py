"""What each part that training changes adds to a memory: a copy of an adapter with some parts as before training.

    B="--base .bases/SmolLM2-135M-Instruct"
    python -m examples.research.memory.parts adapters/smollm2-memory start $B
    python -m examples.research.memory.curve measure memory $B --adapter work/memory/parts/0/without_start --label start

The parts: `start`, where the fast weights start; `down`, A; `log_rate`, the rates. Several are put together by commas.
A start was trained together with its A: put back `start`, or `start,down`.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, set_seed

from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.files import replacing
from hf_iai import IAIConfig

PARTS = ("start", "down", "log_rate")


def main(
    adapter: Path,
    parts: Annotated[str, typer.Argument(help="Which parts are as before training.")],
    base: BaseOption = SMOLLM2,
    seed: Annotated[int, typer.Option(help="The seed it was trained with, which draws A.")] = 0,
    work: Path = Path("work/memory/parts"),
) -> None:
    names = parts.split(",")
    if wrong := set(names) - set(PARTS):
        raise typer.BadParameter(f"unknown parts {sorted(wrong)}; use {', '.join(PARTS)}")
    set_seed(seed)
    untrained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), IAIConfig.from_pretrained(adapter))
    before, weights = get_peft_model_state_dict(untrained), load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    mended = {key: before[key].contiguous() if _part(key) in names else value for key, value in weights.items()}
    folder = work / str(seed) / f"without_{'_'.join(names)}"
    with replacing(folder / CONFIG_NAME) as temporary:
        shutil.copyfile(adapter / CONFIG_NAME, temporary)
    with replacing(folder / SAFETENSORS_WEIGHTS_NAME) as temporary:
        save_file(mended, temporary, metadata={"format": "pt"})
    print(folder)


def _part(key: str) -> str:
    """Of a weight such as base_model.iai.head.log_rate.NAME."""
    return key.split(".")[-2]


if __name__ == "__main__":
    typer.run(main)
