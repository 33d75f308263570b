"""Read a document into a task state, save it, and continue the document under it.

    python read_document.py                # reads the source of Python's own package json
    python read_document.py book.txt       # or your own text
    python read_document.py book.txt --output my-state

Nothing is downloaded or trained. The small base and the adapter "code-prefix" come with hf_iai; both were trained on
source code. Takes about 10 seconds on a CPU.
"""

from pathlib import Path
from typing import Annotated

import typer
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from hf_iai import TaskState, chunk_text
from hf_iai.embedded import library_documents
from hf_iai.hub.published import published_adapter

CHUNK_SIZE, PROMPT = 128, 32  # tokens; the adapter was trained with chunks of this size


def main(
    document: Annotated[Path | None, typer.Argument(help="A text file.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the state.")] = Path("my-state"),
) -> None:
    # The model. With an adapter from the Hub its id stands here.
    model = AutoPeftModelForCausalLM.from_pretrained(published_adapter("code-prefix"))
    tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)

    # The document. Its last chunk is not read: it shows below what reading has gained.
    if document is not None:
        text = document.read_text(encoding="utf-8")
    else:
        text = "".join(part["text"] for part in library_documents("held_out", packages=["json"]))
    chunks = [c for c in chunk_text(text, tokenizer, chunk_size=CHUNK_SIZE) if c["input_ids"].shape[1] == CHUNK_SIZE]
    if len(chunks) < 2:
        raise typer.BadParameter(f"the document fills {len(chunks)} chunks of {CHUNK_SIZE} tokens: give at least 2")
    *chunks, last = chunks

    # Read: one pass for each chunk; the state keeps its size, however long the document is.
    state = model.adapt(chunks)
    state.save_pretrained(output)
    state = TaskState.from_pretrained(output)
    size = f"{int(state.num_tokens)} tokens in {int(state.step)} chunks"
    print(f"read {size}; the state has {state.nbytes} bytes, see {output}")

    # Continue the first lines of the last chunk, without the state and with it.
    prompt = {name: last[name][:, :PROMPT] for name in ("input_ids", "attention_mask")}
    print(f"\nprompt:\n{tokenizer.decode(prompt['input_ids'][0])}")
    for title, under in (("without the state", {}), ("with the state", {"task_state": state})):
        tokens = model.generate(**prompt, **under, max_new_tokens=32, do_sample=False)[0]
        print(f"\ncontinued {title}:\n{tokenizer.decode(tokens[PROMPT:])}")

    # Does the state help? The loss of the real last chunk, with and without it.
    effect = model.state_effect(state, last)
    print(
        f"\nloss of the last chunk: {effect['loss_without']:.3f} without the state, {effect['loss_with']:.3f} with it"
    )


if __name__ == "__main__":
    typer.run(main)
