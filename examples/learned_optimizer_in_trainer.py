"""A learned optimizer in a plain transformers Trainer: PEFT prompt tuning in a few steps, next to AdamW.

    python learned_optimizer_in_trainer.py
    python learned_optimizer_in_trainer.py --num-documents 24

PEFT's own prompt tuning is trained on the first chunks of a document, one step for each chunk, and tested on the text
that follows. `LearnedOptimizer` takes its steps from the published adapter "code-prompt-optimizer" and has no learning
rate to tune. All runs start from the adapter's learned prompt. (From PEFT's random prompt, AdamW with the best rate is
better: the learned optimizer was trained from its own start.) Takes about 30 seconds on a CPU.
"""

import numpy as np
import torch
import typer
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_iai import LearnedOptimizer, embedded_base, episodes_from_documents
from hf_iai.embedded import library_documents
from hf_iai.hub.published import published_adapter

CHUNK_SIZE = 64  # tokens
RATES = (1e-2, 3e-2, 1e-1)  # of AdamW: the best three of six
PACKAGES = ["http", "json", "logging", "unittest", "xml"]  # not in the training of base and adapter


def new_model(prompt: torch.Tensor) -> PeftModel:  # (m, d)
    """The base with a soft prompt of PEFT."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base()), config)
    model.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return model


def train(model: PeftModel, chunks: list[list[int]], optimizer: tuple[type, dict]) -> None:
    """One step for each chunk. The first token of a chunk is not predicted, as when a state reads it."""
    args = TrainingArguments(
        output_dir="my-prompt",
        num_train_epochs=1,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_grad_norm=0,  # a learned step needs neither clipping nor a schedule
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": chunk, "labels": [-100, *chunk[1:]]} for chunk in chunks]
    trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main(num_documents: int = 8, steps: int = 8) -> None:
    adapter = published_adapter("code-prompt-optimizer")  # or a Hub id
    reader = AutoPeftModelForCausalLM.from_pretrained(adapter)
    prompt = reader.initial_state().tensors["prompt"][0, 0, 0]
    episodes = episodes_from_documents(
        library_documents("held_out", packages=PACKAGES),
        AutoTokenizer.from_pretrained(embedded_base()),
        chunk_size=CHUNK_SIZE,
        num_chunks=steps,
        max_per_document=1,
    )
    episodes = episodes.shuffle(seed=0).select(range(num_documents))

    optimizers = {"no training": None, "learned optimizer": lambda model: {"model": model, "weights": adapter}}
    optimizers |= {f"AdamW at {rate:g}": lambda model, rate=rate: {"lr": rate} for rate in RATES}
    print(f"loss of the text that follows, {steps} steps on each of {num_documents} documents")
    for name, keywords in optimizers.items():
        losses = []
        for episode in episodes:
            set_seed(0)
            model = new_model(prompt)
            if keywords is not None:
                kind = LearnedOptimizer if name == "learned optimizer" else torch.optim.AdamW
                train(model, [chunk["input_ids"] for chunk in episode["support"]], (kind, keywords(model)))
            query = torch.tensor([episode["query"][0]["input_ids"]])
            with torch.no_grad():
                losses.append(model.eval()(input_ids=query, labels=query).loss.item())
        print(f"{name:20s} {np.mean(losses):.3f}")


if __name__ == "__main__":
    typer.run(main)
