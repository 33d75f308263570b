"""Export of a linear state as a plain transformers classifier, which loads without hf_iai."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import IAIConfig
from ..files import check_replaceable, replace_folder
from ..hub.cards import base_in_words, base_on_hub
from ..model import IAIModel
from ..state import TaskState
from .peft import unwrapped

# Powers of two, so that multiplying by them causes no rounding.
GAIN = 2.0**30  # makes the pooled vector so large that the residual is lost below float32's precision
SMALL = 2.0**-17  # makes the input of tanh so small that tanh is the identity


@dataclass(frozen=True)
class Family:
    """The places in a classifier of transformers that an export sets. All but `activation` are paths of modules.

    Args:
        dense: the layer of the head before the last one.
        classifier: the last layer of the head.
        activation: the activation after `dense`.
        layers: the layers of the encoder. None if the head pools and normalizes by itself.
        value, output: modules of the attention within a layer.
    """

    dense: str
    classifier: str
    activation: str = "tanh"
    layers: str | None = None
    value: str = "attention.self.value"
    output: str = "attention.output.dense"


ROBERTA = Family("classifier.dense", "classifier.out_proj", layers="roberta.encoder.layer")
FAMILIES = {
    "bert": Family("bert.pooler.dense", "classifier", layers="bert.encoder.layer"),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": Family(
        "pre_classifier", "classifier", "relu", "distilbert.transformer.layer", "attention.v_lin", "attention.out_lin"
    ),
    "modernbert": Family("head.dense", "classifier", "linear"),
}


def export_classifier(
    model: PeftModel,
    state: TaskState,
    path: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a linear state as a checkpoint for `AutoModelForSequenceClassification`, in the base's own class.

    Its logits equal those of `model(**query, task_state=state)` up to float32 rounding. The names of the labels are
    stored in its `id2label`.

    The heads of BERT, RoBERTa and DistilBERT only see the first token. For them one more encoder layer is added. Its
    attention is uniform, so the first token holds the mean of all tokens, and its LayerNorm scales this mean to the
    length of the features. The head's dense layer passes the features on, and its last layer holds the rows. The head
    of ModernBERT pools and normalizes by itself.

    Args:
        model: the IAI model that made the state. It does not change. In regime explicit its LoRA is merged into the
            checkpoint.
        state: the state of one task that has read at least one example.
        path: a folder that is new, empty or an earlier export. An earlier export is replaced when the new one is
            complete.
        tokenizer: saved with the weights. None: the tokenizer in the base's folder, if the base is a folder.

    Raises:
        ValueError: if the model has no linear state of classes, the state has several tasks or no class, the base is
            quantized, or the head of its family cannot express the classifier; the message lists the families that can.
        FileExistsError: if `path` is a link, or contains something else than an earlier export.

    Example:
        >>> export_classifier(model, state, "intents")  # doctest: +SKIP
        >>> pipeline("text-classification", "intents")("what will it cost")  # doctest: +SKIP
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, IAIModel) or "classifier" not in tuner.task.exports:
        raise ValueError(
            f"export_classifier needs an IAI model with a linear state of likelihood 'softmax', got "
            f"{type(model).__name__}"
        )
    config, path = model.active_peft_config, Path(os.path.abspath(path))
    family = _checked_family(tuner.model)
    check_replaceable(path)
    state = tuner.checked_state(state).to("cpu")
    names = state.label_names
    if len(names) < 2:  # transformers takes a single output for a regression
        raise ValueError(f"a classifier needs two classes, this state has {list(names)}: let it read labelled examples")
    rows, bias = (t[0].detach().double().cpu() for t in tuner.core.rows(state.to(tuner.model.device)))
    classifier = _classifier(unwrapped(tuner, merged=config.lora_answers), family, config, names)
    _set_head(classifier, family, rows, bias)
    source = config.base_model_name_or_path
    if tokenizer is None and source and Path(source, "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source)

    def write(new: Path) -> None:
        classifier.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        _card(path.name, config, state).save(new / "README.md")

    replace_folder(path, write)


def _checked_family(base: PreTrainedModel) -> Family:
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError("a quantized base cannot be written: load it without quantization_config and read again")
    if base.config.model_type not in FAMILIES:
        raise ValueError(
            f"the stock classifier of {base.config.model_type!r} cannot express pooled features of unit length: "
            f"export is for {sorted(FAMILIES)}; answer with hf_iai instead"
        )
    return FAMILIES[base.config.model_type]


@torch.no_grad()
def _classifier(base: PreTrainedModel, family: Family, config: IAIConfig, names: tuple[str, ...]) -> PreTrainedModel:
    """The base's class, with a head for these classes that sees the first token, or pools by itself."""
    settings = copy.deepcopy(base.config)
    settings.id2label, settings.label2id = dict(enumerate(names)), {name: c for c, name in enumerate(names)}
    settings.problem_type = "single_label_classification"
    if family.layers:
        settings.num_hidden_layers += 1
    else:
        settings.classifier_pooling, settings.classifier_activation = config.pooling, "linear"
    classifier = type(base)(settings).float().eval()
    encoder = f"{base.base_model_prefix}."
    weights = {name: tensor for name, tensor in base.state_dict().items() if name.startswith(encoder)}
    classifier.load_state_dict(weights, strict=False)
    if family.layers:
        _set_pooling(classifier.get_submodule(family.layers)[-1], family, mean=config.pooling == "mean")
    return classifier


def _set_pooling(layer: nn.Module, family: Family, *, mean: bool) -> None:
    """Make a layer that gives LayerNorm(mean of all tokens), or LayerNorm(the token itself), at every token.

    With queries and keys of zero, every token attends equally to all tokens. The residual adds the token itself, so the
    mean has to be much larger. The feed-forward part adds nothing.
    """
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    if mean:
        nn.init.eye_(layer.get_submodule(family.value).weight)
        nn.init.eye_(layer.get_submodule(family.output).weight).mul_(GAIN)


@torch.no_grad()
def _set_head(model: PreTrainedModel, family: Family, rows: Tensor, bias: Tensor) -> None:  # (C, d), (C,)
    """Set the last layer, which sees sqrt(d) x, or what an invertible dense layer makes of it; x are the features."""
    dense, last = model.get_submodule(family.dense), model.get_submodule(family.classifier)
    width = rows.shape[1]
    rows = rows / width**0.5
    scale, shift = {
        "tanh": (SMALL, 0.0),
        "relu": (1.0, width**0.5),  # no coordinate is below -sqrt(d)
        "linear": (GAIN, 0.0),  # a LayerNorm follows; the gain makes its eps negligible
    }[family.activation]
    if family.layers:  # the layer has two LayerNorms in a row, and the second one divides by sqrt(1 + eps)
        eps = next(m.eps for m in model.get_submodule(family.layers)[-1].modules() if isinstance(m, nn.LayerNorm))
        rows = rows * (1 + eps) ** 0.5
    dense.weight.copy_(scale * torch.eye(width))
    if dense.bias is not None:
        dense.bias.fill_(shift)
    for norm in (m for m in model.get_submodule(family.dense.rpartition(".")[0]).children() if not family.layers):
        if isinstance(norm, nn.LayerNorm):
            norm.reset_parameters()
    last.bias.copy_(bias - shift * rows.sum(1))
    last.weight.copy_(rows / scale if family.layers else rows)


def _card(name: str, config: IAIConfig, state: TaskState) -> ModelCard:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=base_on_hub(config),
        tags=["hf_iai", "task-state"],
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {name}

A classifier of {len(state.label_names)} labels that read {int(state.num_tokens)} tokens in {int(state.step)} chunks \
of labelled texts and was not trained on them. It needs `transformers` only.

- Made by: `{state.identity.name}`, a linear state; identity `{state.identity.fingerprint}`
- Encoder: {base_in_words(config)}

```python
from transformers import pipeline

pipeline("text-classification", "{name}")("a text")
```

Run it in float32 or bfloat16: weights of the added layers are beyond float16. It cannot read any further: read on with
the adapter that made the state, and export again.
""")
