"""Compare reading with gradient descent on each document: PEFT's prompt and prefix tuning with as many slots.

    python -m examples.research.documents.tuned_baselines --num 12 --counts 1,4    # 4 minutes on one core

For every held-out window, PROMPT_TUNING and PREFIX_TUNING with m virtual tokens are trained on the n chunks before the
query (AdamW, full batch), at each of 4 learning rates. The rate with the best mean query loss is reported, which
favours the baseline. Next to it stand the adapter's loss and both adaptation times. 16 chunks take 10 minutes more.
"""

import time
from pathlib import Path

import numpy as np
import torch
import typer
from peft import AutoPeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.rows import write_rows
from examples.research.documents.code_curve import CHUNK, held_out_documents, windows
from hf_iai import embedded_base
from hf_iai.evaluation.losses import token_losses

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
METHODS = {"prompt_tuning": PromptTuningConfig, "prefix_tuning": PrefixTuningConfig}


def tune(method: str, chunks: torch.Tensor, slots: int, rate: float, steps: int):  # (n, C)
    """A PEFT model tuned on one document's chunks."""
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(embedded_base())
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", num_virtual_tokens=slots))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    mask = torch.ones_like(chunks)
    for _ in range(steps):
        model(input_ids=chunks, attention_mask=mask, labels=chunks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def query_losses(model, query: torch.Tensor) -> np.ndarray:  # (1, T) -> (T - 1,)
    logits = model(input_ids=query, attention_mask=torch.ones_like(query)).logits[:, -query.shape[1] :]
    return token_losses(logits, query)[0].numpy()


def main(
    adapter: Path = Path("adapters/code-prefix"),
    num: int = 12,
    counts: str = "1,4,16",
    steps: int = 20,
    output: Path = Path("work/tuned_baselines.json"),
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    test = windows(held_out_documents(), tokenizer, 16, num, seed=1)
    rows = []
    for n in map(int, counts.split(",")):
        losses: dict[tuple, list] = {}
        seconds: dict[str, list] = {}
        for episode in tqdm(test, desc=f"{n} chunks"):
            chunks = torch.tensor([e["input_ids"] for e in episode["support"]])[-n:]
            query = torch.tensor([episode["query"][0]["input_ids"]])
            start = time.perf_counter()
            state = model.adapt([{"input_ids": c[None]} for c in chunks])
            seconds.setdefault("iai", []).append(time.perf_counter() - start)
            with model.using(state):
                losses.setdefault(("iai", 0.0), []).append(query_losses(model, query))
            for method in METHODS:
                for rate in RATES:
                    start = time.perf_counter()
                    tuned = tune(method, chunks, model.num_slots, rate, steps)
                    seconds.setdefault(method, []).append(time.perf_counter() - start)
                    losses.setdefault((method, rate), []).append(query_losses(tuned, query))
        for method in ("iai", *METHODS):
            mean = {rate: np.mean(values) for (name, rate), values in losses.items() if name == method}
            best = min(mean, key=mean.get)
            per_window = np.mean(losses[method, best], 1)
            row = {"method": method, "num_chunks": n, "rate": best, "loss": float(mean[best])}
            row |= {"loss_32": float(np.mean([v[31:] for v in losses[method, best]]))}
            row |= {"standard_error": float(per_window.std(ddof=1) / len(per_window) ** 0.5)}
            rows.append(row | {"seconds_per_document": float(np.mean(seconds[method]))})
            print(rows[-1])
    settings = {"num": num, "steps": steps, "rates": RATES, "chunk": CHUNK, "slots": model.num_slots}
    write_rows(rows, output, f"research.documents.tuned_baselines --num {num} --counts {counts}", settings)


if __name__ == "__main__":
    typer.run(main)
