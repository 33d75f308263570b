"""Train an adapter that reads your documents chunk by chunk, and measure it on documents it was not trained on.

    python train_on_documents.py                        # source code of Python packages, the small base inside hf_iai
    python train_on_documents.py my-texts               # all .txt files of a folder; every fifth is for the test
    python train_on_documents.py my-texts --base Qwen/Qwen3-0.6B --steps 2000       # wants a GPU

The state is a prefix of 32 slots, most of which keep single tokens. At the end stands a table of the loss against
chunks read, next to the bare base with as many real tokens ("fewer_shots") and with all of them ("full_context").
After so short a training the first chunk gains the most. 60 steps take about a minute on a CPU; 500 are better. The
picture needs matplotlib: pip install 'hf_iai[plots]'
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments, embedded_base, episodes_from_documents, evaluate_curve
from hf_iai.embedded import library_documents


def main(
    folder: Annotated[Path | None, typer.Argument(help="Folder of .txt files.")] = None,
    base: Annotated[str | None, typer.Option(help="Hub id or folder of the base.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the adapter and the curve.")] = Path("my-reader"),
    steps: int = 60,
    chunk_size: int = 64,
    max_chunks: int = 4,
    num_test: int = 32,
) -> None:
    if folder is not None:
        documents = [{"path": file.name, "text": file.read_text("utf-8")} for file in sorted(folder.rglob("*.txt"))]
    else:
        documents = list(library_documents("held_out"))
    if len(documents) < 2:
        raise typer.BadParameter(
            f"{folder} has {len(documents)} .txt files: give at least 2, one of them is for the test"
        )
    test, train = documents[::5], [d for i, d in enumerate(documents) if i % 5]

    base = base or embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = IAIConfig(
        task_type="CAUSAL_LM",
        num_state_tokens=32,
        num_kept_tokens=28,
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)

    # An episode: some chunks of a document to read, and the chunk after them to predict.
    sizes = {"chunk_size": chunk_size, "num_chunks": max_chunks, "max_per_document": 8}
    episodes = episodes_from_documents(train, tokenizer, **sizes).shuffle(seed=0)
    args = IAITrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        chunk_size=chunk_size,
        max_chunks=max_chunks,
        learning_rate=1e-3,
        state_learning_rate=1e-2,  # the slots' start wants a larger rate than LoRA
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    IAITrainer(model=model, args=args, train_dataset=episodes, processing_class=tokenizer).train()
    model.save_pretrained(output)

    # The loss of the next chunk after 0, 1, 2, 4, ... chunks, on documents that training has not seen.
    held_out = episodes_from_documents(test, tokenizer, **sizes).shuffle(seed=0)
    held_out = held_out.select(range(min(num_test, len(held_out))))
    counts = [n for n in (0, 1, 2, 4, 8, 16) if n <= max_chunks]
    curve = evaluate_curve(model, held_out, counts, tokenizer=tokenizer, chunk_size=chunk_size)
    curve.print()
    try:
        curve.plot(output / "curve.png")
    except ImportError as error:  # says what to install
        print(error)
    print(f"adapter and picture: {output}")


if __name__ == "__main__":
    typer.run(main)
