"""`hf-iai train`: trains an adapter to read documents."""

import sys
from pathlib import Path

import torch
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from ..config import IAIConfig
from ..data import episodes_from_documents
from ..embedded import EMBEDDED_NAME, embedded_base
from ..trainer import IAITrainer
from ..training_args import IAITrainingArguments
from .inputs import documents, loaded_tokenizer
from .losses import print_losses


def train(data: Path, output: Path, base: str, config: dict, arguments: dict) -> None:
    """Train an adapter on documents; write the adapter and its card.

    Args:
        data: a folder of text files, one of them, or a table with `"text"`, see `data.tables`.
        output: folder for the adapter.
        base: Hub id or folder of the base model. `"hf_iai:embedded"` is the small base inside the package.
        config: fields of `IAIConfig` that differ from its defaults.
        arguments: fields of `IAITrainingArguments` that differ from its defaults.

    Raises:
        ValueError: if a value cannot work, the base cannot be loaded, or the documents are too short.
    """
    reader = text_config(**config)
    base = embedded_base() if base == EMBEDDED_NAME else base
    tokenizer = loaded_tokenizer(base)
    args = IAITrainingArguments(
        output_dir=str(output),
        save_strategy="no",  # the adapter is saved once, below
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        **arguments,
    )
    torch.manual_seed(args.seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), reader)
    chunk_size = args.chunk_size or model.usual_chunk_size
    episodes = episodes_from_documents(
        documents(data), tokenizer, chunk_size=chunk_size, num_chunks=args.max_chunks, seed=args.seed
    )
    trainer = IAITrainer(model=model, args=args, train_dataset=episodes, processing_class=tokenizer)
    print_losses(trainer)
    result = trainer.train()
    typer.echo(f"trained for {result.global_step} steps; mean loss {result.training_loss:.3f}")
    trainer.model.save_pretrained(output)
    trainer.create_model_card(dataset=data.name)


def text_config(*, target_modules: str | None = None, **values) -> IAIConfig:
    """The configuration for the options of `hf-iai train`.

    Args:
        target_modules: `"all-linear"`, or names with commas between them.
        values: other fields of `IAIConfig`.

    Raises:
        ValueError: if the state type is not for texts, or `IAIConfig` refuses a value.

    Example:
        >>> from hf_iai.commands.train import text_config
        >>> sorted(text_config(target_modules="q_proj,v_proj", r=4).target_modules)
        ['q_proj', 'v_proj']
    """
    if (state_type := values.get("state_type")) in ("linear", "mlp"):
        raise ValueError(f"a state of type {state_type!r} is not read from texts: train it with IAITrainer")
    if target_modules is not None:
        values["target_modules"] = target_modules if target_modules == "all-linear" else target_modules.split(",")
    return IAIConfig(task_type="CAUSAL_LM", **values)
