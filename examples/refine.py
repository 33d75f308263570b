"""Refine the answers to known queries chunk by chunk; no task state is kept (regime "implicit").

    python refine.py
    python refine.py --chunk-size 16

The chunks show a string function by examples: `stone -> Stone`. The query is another word, `house ->`, and the answer
is one of a few labels. Each chunk refines the prediction of each query. Nothing is trained: untrained, the prediction
is a product of experts, one for each chunk. The small base inside hf_iai has seen such functions in its pretraining,
but only the chunks say which function is meant. Takes about 20 seconds on a CPU.
"""

import torch
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_iai import IAIConfig, chunk_text, embedded_base

FUNCTIONS = {
    "capital": str.capitalize,
    "upper": str.upper,
    "last": lambda word: word[-1],
    "double": lambda word: 2 * word,
}
READ = (
    "tree lamp river stone cloud bread glass paper music green table horse light plant chair mouse water train".split()
)
ASKED = "house flag pencil garden".split()


def main(chunk_size: int = 32) -> None:
    base = embedded_base()  # or the Hub id of any decoder with attention in every layer
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = IAIConfig(task_type="CAUSAL_LM", regime="implicit", target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()

    right: dict[int, list[bool]] = {}  # chunks read -> whether the most probable label is right
    for name, function in FUNCTIONS.items():
        text = "".join(f"{word} -> {function(word)}\n" for word in READ)
        for word in ASKED:
            # A label may have any number of tokens.
            labels = [other(word) for other in FUNCTIONS.values()]
            ids = tokenizer([f" {label}\n" for label in labels], add_special_tokens=False)["input_ids"]
            query = tokenizer(f"{word} ->", return_tensors="pt")
            answer = labels.index(function(word))

            # `chunks` may be any stream. With `with_start` the first prediction is that without a chunk.
            chunks = chunk_text(text, tokenizer, chunk_size=chunk_size)
            for read, logits in enumerate(model.refine(chunks, query, labels=ids, with_start=True)):
                probabilities = logits.softmax(-1)[0]
                right.setdefault(read, []).append(probabilities.argmax().item() == answer)
                if word == ASKED[0] and read in (0, 1, 2, 4):
                    shown = "  ".join(f"{label} {p:.2f}" for label, p in zip(labels, probabilities, strict=True))
                    print(f"{name:8s} after {read} chunks: {shown}")

    print(f"\nright answers, {len(FUNCTIONS)} functions of {len(ASKED)} words:")
    for read, found in right.items():
        if len(found) == len(FUNCTIONS) * len(ASKED):  # longer texts have more chunks
            print(f"after {read} chunks: {sum(found) / len(found):.2f}")


if __name__ == "__main__":
    typer.run(main)
