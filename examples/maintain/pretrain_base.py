"""Pretrain the embedded base: a small Llama with its own byte-level BPE tokenizer.

    python -m examples.maintain.pretrain_base --output hf_iai/embedded/base          # about 40 minutes on 2 cores

Two thirds of the sequences are library code (train split only), one third are generated in-context tasks. The run
saves a checkpoint every 500 steps and continues from it. `examples/maintain/evaluate_base.py` measures the base.
"""

import time
from pathlib import Path

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.research.common.files import replacing, write_json
from hf_iai.embedded.generated_tasks import GENERATORS, generate_task_text
from hf_iai.embedded.library_code import library_documents

VOCAB_SIZE, WINDOW = 1024, 512
END = "<|endoftext|>"
TASK_SHARES = {"markov": 0.4, "recall": 0.15, "points": 0.1, "string_function": 0.15, "repeats": 0.2}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Single digits, so that a number is read digit by digit; one token per " a" of the generated tasks.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=WINDOW,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Batches:
    """The batch (B, WINDOW) of a step depends on (seed, step) alone, so a run can continue without any other state."""

    def __init__(self, tokenizer, documents: list[str], batch_size: int, seed: int) -> None:
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
        self.documents = [np.array([tokenizer.eos_token_id, *ids], dtype=np.int16) for ids in encoded]
        self.documents = [ids for ids in self.documents if len(ids) > WINDOW]
        lengths = np.array([len(ids) for ids in self.documents], dtype=float)
        self.weights = lengths / lengths.sum()

    def __call__(self, step: int) -> torch.Tensor:  # (B, WINDOW)
        rng = np.random.default_rng((self.seed, step))
        rows = [self._task(rng) if rng.random() < 1 / 3 else self._code(rng) for _ in range(self.batch_size)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _code(self, rng: np.random.Generator) -> np.ndarray:
        ids = self.documents[rng.choice(len(self.documents), p=self.weights)]
        start = int(rng.integers(0, len(ids) - WINDOW + 1))
        return ids[start : start + WINDOW]

    def _task(self, rng: np.random.Generator) -> np.ndarray:
        kind = str(rng.choice(list(TASK_SHARES), p=list(TASK_SHARES.values())))
        ids: list[int] = []
        while len(ids) < WINDOW:  # another task of the kind when one is short
            ids += self.tokenizer(generate_task_text(rng, kind, WINDOW // 4 if kind != "markov" else WINDOW))[
                "input_ids"
            ]
            ids.append(self.tokenizer.eos_token_id)
        return np.array(ids[:WINDOW], dtype=np.int16)


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up over 100 steps, constant, then linear to zero over the last 60% of the steps."""
    return min(1.0, (step + 1) / 100, (steps - step) / (0.6 * steps))


def main(
    output: Path = Path("hf_iai/embedded/base"),
    work: Path = Path("work/pretrain"),
    steps: int = 2200,
    batch_size: int = 16,
    lr: float = 4e-3,
    seed: int = 0,
    checkpoint_every: int = 500,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    documents = [d["text"] for d in library_documents("train")]
    rng = np.random.default_rng(seed)
    samples = [generate_task_text(rng, k, 256) for k in GENERATORS for _ in range(200)]
    if (work / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    else:
        tokenizer = train_tokenizer(documents[::5] + samples)
        tokenizer.save_pretrained(work / "tokenizer")
    batches = Batches(tokenizer, documents, batch_size, seed)
    tokens = sum(len(d) for d in batches.documents)
    print(f"{len(batches.documents)} documents, {tokens / 1e6:.1f}M tokens, {sum(map(len, documents)) / 1e6:.0f} MB")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(base_config(tokenizer)).to(device)
    optimizers = make_optimizers(model, lr)
    first = 0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]
    started, smooth = time.time(), None
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, mininterval=30)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
        ids = batches(step).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if (step + 1) % checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            with replacing(checkpoint) as temporary:
                torch.save(state, temporary)
            model.save_pretrained(work / "latest")
            tokenizer.save_pretrained(work / "latest")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    recipe = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "seconds": round(time.time() - started)}
    write_json(recipe | {"corpus_tokens": tokens}, output / "recipe.json")


if __name__ == "__main__":
    typer.run(main)
