"""Shared by all trainings: continue from a checkpoint, and save the adapter beside it."""

from pathlib import Path

import torch
from peft import PeftModel

from hf_iai import IAITrainer, IAITrainingArguments


def train_adapter(
    model: PeftModel, episodes, tokenizer, output: Path, *, steps: int, seed: int, callbacks=(), **arguments
) -> PeftModel:
    """Train an adapter for `steps` steps into `output/adapter`; `arguments` are those of `IAITrainingArguments`."""
    shared = {
        "output_dir": str(output / "trainer"),
        "max_steps": steps,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 25,
        "save_steps": 200,
        "save_total_limit": 1,
        "seed": seed,
        "report_to": [],
    }
    trainer = IAITrainer(
        model,
        IAITrainingArguments(**shared | arguments),
        train_dataset=episodes,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    has_checkpoint = any((output / "trainer").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=has_checkpoint)
    model.save_pretrained(output / "adapter")
    return model.eval()
