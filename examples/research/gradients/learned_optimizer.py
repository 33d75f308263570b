"""A learned optimizer in a plain transformers Trainer, next to AdamW with the best of 6 learning rates.

    python -m examples.research.gradients.learned_optimizer                  # from PEFT's default start
    python -m examples.research.gradients.learned_optimizer --peft-type LORA
    python -m examples.research.gradients.learned_optimizer --learned-start --seeds 0

PEFT's own prompt tuning is trained on the chunks of one held-out document, in their order, one step for each. The
measured loss is that of the text that follows. AdamW's rate is chosen by that loss, which favours AdamW.
`--learned-start` starts at the adapter's theta(0), which has no seed. Intervals are bootstrapped over documents; the
last row shows paired differences.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import typer
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from examples.research.common.files import write_json
from examples.research.common.provenance import provenance
from examples.research.common.rows import print_rows
from examples.research.documents.code_curve import held_out_documents
from examples.research.documents.tuned_baselines import query_losses
from hf_iai import LearnedOptimizer, embedded_base, episodes_from_documents, export_to_peft
from hf_iai.evaluation import Curve

CHUNK, STEPS = 64, 8
PLAIN = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
    "LORA": LoraConfig(task_type="CAUSAL_LM", r=8),
}
RATES = {"PROMPT_TUNING": "1e-2 3e-2 1e-1 3e-1 1 3", "LORA": "3e-4 1e-3 3e-3 1e-2 3e-2 1e-1"}
# The Trainer neither clips nor schedules, as a learned step needs neither.
ARGUMENTS = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
ARGUMENTS |= {"max_grad_norm": 0, "lr_scheduler_type": "constant", "output_dir": "work/trainer", "report_to": []}
ARGUMENTS |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}


def untrained(peft_type: str, start: str | None) -> PeftModel:
    config = PeftConfig.from_pretrained(start) if start else PLAIN[peft_type]
    config.inference_mode = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base()), config)
    if start:
        set_peft_model_state_dict(model, load_peft_weights(start, device="cpu"))
    return model


def train(model: PeftModel, support: list[dict], optimizer: tuple[type, dict]) -> None:
    rows = [{"input_ids": e["input_ids"], "labels": [-100, *e["input_ids"][1:]]} for e in support]  # as states read
    trainer = Trainer(model, TrainingArguments(**ARGUMENTS), train_dataset=rows, optimizer_cls_and_kwargs=optimizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def losses(name: str, test, seed: int, adapter: str, *start) -> np.ndarray:  # (E, T - 1)
    found = []
    for episode in tqdm(test, desc=f"{name}, seed {seed}"):
        set_seed(seed)
        model = untrained(*start)
        learned = (LearnedOptimizer, {"model": model, "weights": adapter})
        if name != "none":
            train(model, episode["support"], learned if name == "learned" else (torch.optim.AdamW, {"lr": float(name)}))
        query = torch.tensor([episode["query"][0]["input_ids"]])
        found.append(query_losses(model.eval().cpu(), query))
    return np.stack(found)


def main(
    adapter: str = "adapters/code-prompt-optimizer", peft_type: str = "PROMPT_TUNING", learned_start: bool = False,
    num: int = 48, seeds: str = "0,1,2", output: Path = Path("work/learned_optimizer.json"),
) -> None:  # fmt: skip
    recipe = {name: str(value) for name, value in locals().items()} | provenance()
    disable_progress_bar()
    rates, tokenizer = RATES[peft_type].split(), AutoTokenizer.from_pretrained(embedded_base())
    sizes = {"chunk_size": CHUNK, "num_chunks": STEPS, "max_per_document": 1}
    test = episodes_from_documents(held_out_documents(), tokenizer, **sizes).shuffle(0)
    test = test.select(range(min(num, len(test))))
    with TemporaryDirectory() as start:
        if learned_start:
            reader = AutoPeftModelForCausalLM.from_pretrained(adapter)
            export_to_peft(reader, reader.initial_state(), start, peft_type=peft_type)
        common = (adapter, peft_type, start if learned_start else None)
        keys = [(name, STEPS, int(seed)) for name in ("none", "learned", *rates) for seed in seeds.split(",")]
        curve = Curve({key: losses(key[0], test, key[2], *common) for key in keys}, np.array(test["group"]))
    rows = [{"optimizer": name} | curve.mean(name, STEPS) for name in curve.methods]
    best = min(rates, key=lambda rate: curve.mean(rate, STEPS)["mean"])
    difference = curve.difference(("learned", STEPS), (best, STEPS))
    rows.append({"optimizer": f"learned - AdamW at {best}"} | difference)
    print_rows(rows)
    recipe |= {"chunk": CHUNK, "steps": STEPS, "documents": len(test)}
    write_json({"rows": rows, "recipe": recipe}, output)


if __name__ == "__main__":
    typer.run(main)
