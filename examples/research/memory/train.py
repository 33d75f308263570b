"""Train a memory: where its fast weights start, A, and a rate for each tensor. Nothing else is learned.

    python -m examples.research.memory.train --base hf_iai/embedded/base --size 128 --seed 0    # 20 minutes on one core
    python -m examples.research.memory.curve measure memory --adapter work/memory/trained/0/adapter --label trained ...

Trained on windows of installed packages that no measurement reads: 1 to 8 chunks to read, and the next one to predict,
after the last 1, 2, 4 and 8 of them. A killed run goes on from its checkpoint.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.training import train_adapter
from hf_iai import IAIConfig, episodes_from_documents
from hf_iai.embedded import library_documents


def main(
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 256,
    max_chunks: Annotated[int, typer.Option(help="K, the most chunks that are read.")] = 8,
    seed: int = 0,
    steps: int = 300,
    batch_size: int = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of rates and A.")] = 1e-3,
    start_lr: Annotated[float, typer.Option(help="Learning rate of the start.")] = 1e-3,
    values: Annotated[str, typer.Option(help="Fields of the configuration, as JSON.")] = "{}",
    work: Path = Path("work/memory/trained"),
) -> None:
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    fields = {"state_type": "prefix+lora", "regime": "parametric", "num_state_tokens": size} | json.loads(values)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), IAIConfig(task_type="CAUSAL_LM", **fields))
    episodes = episodes_from_documents(
        library_documents("train", seed=1000 + seed),
        tokenizer,
        chunk_size=size,
        num_chunks=max_chunks,
        max_per_document=2,
        seed=seed,
    )
    train_adapter(
        model,
        episodes.shuffle(seed=seed),
        tokenizer,
        work / str(seed),
        steps=steps,
        seed=seed,
        chunk_size=size,
        max_chunks=max_chunks,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        state_learning_rate=start_lr,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        halve_chunks=0.0,
        save_steps=25,
    )


if __name__ == "__main__":
    typer.run(main)
