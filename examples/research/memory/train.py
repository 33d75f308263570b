"""Train a memory: where its fast weights start, A, and a rate for each tensor. Nothing else is learned.

    B="--base hf_iai/embedded/base --size 128"
    python -m examples.research.memory.train train $B --seed 0        # 20 minutes on one core
    python -m examples.research.memory.train evaluate $B              # all seeds
    python -m examples.research.memory.curve measure memory $B --adapter work/memory/trained/0/adapter --label mine

Trained on windows of installed packages that no measurement reads: 1 to 8 chunks to read, and the next one to predict,
after the last 1, 2, 4 and 8 of them. A killed run goes on from its checkpoint.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.bases import SMOLLM2, SMOLLM2_FOLDER, BaseOption
from examples.research.common.files import replacing
from examples.research.common.training import train_adapter
from examples.research.documents.adapt_to_documents import report
from hf_iai import IAIConfig, episodes_from_documents
from hf_iai.embedded import library_documents
from hf_iai.evaluation import Curve, evaluate_curve

app = typer.Typer(no_args_is_help=True)
COUNTS = (0, 1, 2, 4, 8, 16)
WORK = Path("work/memory/trained")


@app.command()
def train(
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 256,
    max_chunks: Annotated[int, typer.Option(help="K, the most chunks that are read.")] = 8,
    seed: int = 0,
    steps: int = 300,
    batch_size: int = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of rates and A.")] = 2e-3,
    start_lr: Annotated[float, typer.Option(help="Learning rate of the start.")] = 2e-3,
    values: Annotated[str, typer.Option(help="Fields of the configuration, as JSON.")] = "{}",
    scored: Annotated[str, typer.Option(help="States with a loss; next reads max_chunks in each step.")] = "doubling",
    half: Annotated[bool, typer.Option("--half", help="Save the weights in float16.")] = False,
    work: Path = WORK,
) -> None:
    """Train one memory."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    fields = {"state_type": "prefix+lora", "regime": "parametric", "num_state_tokens": size} | json.loads(values)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), IAIConfig(task_type="CAUSAL_LM", **fields))
    if Path(base) == SMOLLM2_FOLDER:  # the adapter is for the Hub's model, of which the folder is a dequantised copy
        model.active_peft_config.base_model_name_or_path = SMOLLM2
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
        scored_states=scored,
        halve_chunks=0.0,
        **({"min_chunks": max_chunks, "curriculum": 0.0} if scored == "next" else {}),
        save_steps=25,
    )
    if half:
        halve(work / str(seed) / "adapter" / SAFETENSORS_WEIGHTS_NAME)


def halve(path: Path) -> None:
    """Write the weights of a file in float16; PEFT loads them in float32."""
    weights = {name: tensor.half() for name, tensor in load_file(path).items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})


@app.command()
def evaluate(
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 256,
    num: Annotated[int, typer.Option(help="Windows of packages that no training has seen.")] = 128,
    work: Path = WORK,
) -> None:
    """Measure every memory that was trained, next to the untrained one and the bare base: curve.json."""
    tokenizer, curves = AutoTokenizer.from_pretrained(base), []
    windows = episodes_from_documents(
        library_documents("held_out"), tokenizer, chunk_size=size, num_chunks=COUNTS[-1], max_per_document=2
    )
    windows = windows.shuffle(seed=0).select(range(min(num, len(windows))))
    for folder in sorted(work.glob("*/adapter")):
        seed = int(folder.parent.name)
        options = {"tokenizer": tokenizer, "chunk_size": size, "seed": seed}
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        curves.append(evaluate_curve(model, windows, COUNTS, **options))
        torch.manual_seed(seed)
        config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", num_state_tokens=size)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        curves.append(evaluate_curve(model, windows, COUNTS, baselines=(), method="untrained", **options))
    command = f"python -m examples.research.memory.train evaluate --base {base} --size {size} --num {num}"
    report(Curve.concat(curves), work, command=command, windows=len(windows), files=len(set(windows["group"])))


if __name__ == "__main__":
    app()
