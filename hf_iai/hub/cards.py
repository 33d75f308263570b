"""Model cards: descriptions of adapters on the Hub, rendered from `model_cards/template.md`."""

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import peft
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from ..bases.hub_ids import is_hub_id
from ..bases.vector_base import width_in_name
from ..config import IAIConfig
from ..embedded import EMBEDDED_NAME
from ..registry import SIGNALS
from ..tasks import Task, task_of
from .published import data_folder

TAGS = ("hf_iai", "iterative-amortized-inference", "arxiv:2510.11471")
RENDERED = "<!-- Rendered by hf_iai; rendered again when the configuration changes: delete this line to keep edits. -->"
WEIGHTS = "- Weights: {}"
PLACEHOLDER = "# Model Card for Model ID"  # the title of the empty card that PEFT and transformers write

LABELS = {
    "no_context": "bare base, no context",
    "fewer_shots": "fewer shots: bare base, sees as many of the latest tokens as the state has slots",
    "last_chunk": "the state after the last chunk alone",
    "full_context": "bare base, sees all of it, as far as its window goes",
    "static_state": "static state: trained in the same way, reads nothing",
}


@dataclass(frozen=True)
class Measurement:
    """A metric against the number of chunks read, for the table and the `model-index` of a card.

    Args:
        rows: `method`, `num_chunks`, the value of the metric and, for several training seeds, `seed`; as in
            `Curve.rows`.
        data_name: the data it was measured on, in words.
        data_type: the same as a Hub id or a single word.
        measured_by: the command that measured it, or the occasion.
        metric: the column of `rows` with the value; also the type of the metric in the `model-index`.
        unit: the unit of the value, in words.
        method: the method of `rows` that is this adapter.
        labels: table labels of further methods.
        picture: path or address of a picture of the curve.
    """

    rows: list[dict]
    data_name: str
    data_type: str
    measured_by: str
    metric: str = "loss"
    unit: str = "nats per token"
    method: str = "iai"
    labels: dict[str, str] = field(default_factory=dict)
    picture: str | None = None

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows if "seed" in row})

    @property
    def counts(self) -> list[float]:
        return sorted({row["num_chunks"] for row in self.rows})

    def values(self, method: str, num_chunks: float) -> list[float]:
        """The values of all seeds."""
        at = (method, num_chunks)
        return [row[self.metric] for row in self.rows if (row["method"], row["num_chunks"]) == at]

    def curve(self) -> dict[float, float]:
        """The adapter's own value at each number of chunks, averaged over seeds."""
        found = {n: self.values(self.method, n) for n in self.counts}
        return {n: sum(values) / len(values) for n, values in found.items() if values}

    def spread(self) -> float:
        """The largest difference between two seeds of the adapter's own curve."""
        return max(max(values) - min(values) for n in self.counts if (values := self.values(self.method, n)))

    def table(self) -> str:
        """A markdown table with a line per method and a column per number of chunks, averaged over seeds."""
        lines = [["chunks read", *(f"{n:g}" for n in self.counts)], ["---"] * (len(self.counts) + 1)]
        for method in dict.fromkeys(row["method"] for row in self.rows):
            values = [self.values(method, n) for n in self.counts]
            label = (LABELS | {self.method: "**this adapter**"} | self.labels).get(method, method)
            lines.append([label, *(f"{sum(v) / len(v):.3f}" if v else "" for v in values)])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def eval_results(self, task: str = "text-generation") -> list[EvalResult]:
        of = f", mean of {len(self.seeds)} training seeds" if len(self.seeds) > 1 else ""
        return [
            EvalResult(
                task_type=task,
                dataset_type=self.data_type,
                dataset_name=self.data_name,
                metric_type=self.metric,
                metric_name=f"{self.metric} ({self.unit}), chunks read: {n:g}{of}",
                metric_value=round(value, 4),
                metric_args={"num_chunks": n},
            )
            for n, value in self.curve().items()
            if math.isfinite(value)
        ]


@dataclass(frozen=True)
class CardFacts:
    """The facts for a card that are not in the adapter's configuration. Unknown facts are left out, or called unknown.

    Args:
        name: name of the adapter, which is the title of the card.
        model_id: Hub id or folder of the adapter in the example. None: `name`.
        chunk_size: chunk size in the example. None: as much as the model can read at once.
        text, prompt: text and prompt of the example, as Python expressions.
        training_data: the training data, in words.
        command: the command that trains the adapter again.
        hyperparameters: name -> value, if there is no command.
        measurements: measured curves. Without any, the card says that nothing was measured.
        limits: measured limits in words, with the command that measured them.
        license: a license identifier of the Hub.
        language: language codes of the Hub.
        datasets: Hub ids of the training data.
        tags: tags besides those of the method.
        versions: package -> version.
        weights: fingerprint of the measured weights, if the weights in this folder may change.
    """

    name: str
    model_id: str | None = None
    chunk_size: int | None = None
    text: str = '"The task: examples, documentation, code. " * 20'
    prompt: str = '"How it goes on:"'
    training_data: str | None = None
    command: str | None = None
    hyperparameters: dict[str, object] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    limits: tuple[str, ...] = ()
    license: str | None = None
    language: str | list[str] | None = None
    datasets: list[str] | None = None
    tags: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    weights: str | None = None


def model_card(config: IAIConfig, facts: CardFacts) -> ModelCard:
    """The card of an adapter: metadata for the Hub, how to load it, and what was measured.

    Args:
        config: the adapter's configuration.
        facts: everything else that the card says.

    Example:
        >>> from hf_iai import IAIConfig
        >>> from hf_iai.hub.cards import CardFacts, Measurement, model_card
        >>> rows = [{"method": "iai", "num_chunks": n, "loss": 2.5 - 0.1 * n} for n in (0, 1, 2)]
        >>> measured = Measurement(rows, "source code", "code", "`python measure.py`")
        >>> config = IAIConfig(task_type="CAUSAL_LM", base_model_name_or_path="Qwen/Qwen3-0.6B")
        >>> card = model_card(config, CardFacts("reader", measurements=(measured,)))
        >>> card.data.base_model, [result.metric_value for result in card.data.eval_results]
        ('Qwen/Qwen3-0.6B', [2.5, 2.4, 2.3])

    Source: https://huggingface.co/docs/hub/model-cards
    """
    task = task_of(config)
    results = [result for measurement in facts.measurements for result in measurement.eval_results(task.pipeline_tag)]
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=task.pipeline_tag,
        base_model=base_on_hub(config),
        license=facts.license,
        language=facts.language,
        datasets=facts.datasets,
        metrics=sorted({measurement.metric for measurement in facts.measurements}) or None,
        tags=[*TAGS, *facts.tags],
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(data_folder("model_cards") / "template.md"),
        facts=facts,
        adapter="\n".join([describe(config), *([WEIGHTS.format(facts.weights)] if facts.weights else [])]),
        intro=task.card_intro,
        gradients=SIGNALS[config.signal].in_words,
        example=_example(task, config, facts),
        rendered=RENDERED,
    )


def _example(task: Task, config: IAIConfig, facts: CardFacts) -> str:
    """The code that loads and uses the adapter."""
    given_width = width_in_name(config.base_model_name_or_path)
    code = task.card_example if given_width is None else task.card_example_of_vectors
    return code.format(
        model_id=facts.model_id or facts.name,
        text=facts.text,
        prompt=facts.prompt,
        chunking=f"chunk_size={facts.chunk_size}" if facts.chunk_size else "model=model",
        examples_per_chunk=facts.chunk_size or 20,
        width=given_width or config.vector_width,
        num_outputs=config.num_outputs,
    )


def update_card(model: PeftModel, folder: str | os.PathLike, name: str) -> None:
    """Turn the `README.md` that PEFT or transformers has just written in `folder` into the card of an IAI adapter.

    A placeholder is replaced, and so is a rendered card that describes another configuration or other weights. Any
    other card keeps its text; only metadata that the Hub would refuse or could not find is corrected.

    Args:
        model: a PeftModel with an IAI adapter.
        folder: the folder of the saved adapter.
        name: name of the adapter.
    """
    path, config = Path(folder, "README.md"), model.active_peft_config
    card = ModelCard.load(path)
    data = card.data
    tags = [*(data.tags or []), *(model.get_base_model().model_tags or [])]
    tags = [tag for tag in tags if not tag.startswith("base_model:") or base_on_hub(config)]
    weights = model.base_model.identity.fingerprint[:8]
    stale = describe(config) not in card.text or (WEIGHTS.format("") in card.text and weights not in card.text)
    if PLACEHOLDER in card.text or (RENDERED in card.text and stale):
        trained = model.base_model.card_facts.get(model.active_adapter)
        known = trained if trained is not None and trained.weights == weights else CardFacts(name)
        own = {"name": name.split("/")[-1], "model_id": name, "weights": weights, "versions": installed_versions()}
        facts = replace(known, **own, tags=tuple(dict.fromkeys([*known.tags, *tags])))
        model_card(config, facts).save(path)
        return
    data.library_name = "peft"
    data.tags = list(dict.fromkeys([*TAGS, *tags]))
    if isinstance(data.base_model, str) and not is_hub_id(data.base_model):
        data.base_model = base_on_hub(config)
    card.save(path)


def is_edited(path: Path) -> bool:
    """Whether there is a card that neither this package nor PEFT or transformers has written."""
    return path.is_file() and not any(mark in path.read_text() for mark in (RENDERED, PLACEHOLDER))


def describe(config: IAIConfig) -> str:
    """The adapter's configuration as a markdown list."""
    lines = [f"Base: {base_in_words(config)}", *task_of(config).describe()]
    return "\n".join(f"- {line}" for line in lines)


def installed_versions() -> dict[str, str]:
    """The versions of the packages that an adapter depends on."""
    import hf_iai  # not at the top: this file is imported while the package is still being imported

    modules = {"hf_iai": hf_iai, "PEFT": peft, "Transformers": transformers, "PyTorch": torch}
    return {name: module.__version__ for name, module in modules.items()}


def base_in_words(config: IAIConfig) -> str:
    name = config.to_dict()["base_model_name_or_path"]
    if name == EMBEDDED_NAME:
        return f"`{EMBEDDED_NAME}`, the small base inside the package"
    if width := width_in_name(name):
        return f"`hf_iai.vector_base({width})`, which hands vectors of {width} numbers on as they are"
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    folder = os.path.basename(name.rstrip("/")) if name else None  # not the path, which is private to this machine
    return f"`{folder}`, which is not on the Hub" if folder else "a model without a name"


def base_on_hub(config: IAIConfig) -> str | None:
    """The Hub id of the base, or None. With any other `base_model`, the Hub refuses the card and the whole upload."""
    name = config.to_dict()["base_model_name_or_path"]
    return name if is_hub_id(name) else None
