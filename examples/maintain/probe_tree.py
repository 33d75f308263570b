"""What one tree says of every published adapter and of every member of the suite; `compare_trees.py` runs it.

    PYTHONPATH=TREE python examples/maintain/probe_tree.py --tree TREE --output FOLDER

Members are small adapters on random bases, made from configurations and seeds, one for each kind, state, signal and
head. Written are `tensors.safetensors` and `values.json`, each entry under `MEMBER/PART/NAME`. The same file runs on
trees whose modules lie elsewhere: of the package it imports what is public, and nothing of its layout.
"""

import json
import traceback
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ByT5Tokenizer,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
)

import hf_iai
from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments, TaskState
from hf_iai.data import batch_chunks, chunk_examples, chunk_vectors, text_tokens
from hf_iai.evaluation import evaluate_curve

TENSORS, VALUES = "tensors.safetensors", "values.json"
VOCAB, WINDOW, SLOTS = 97, 128, 4
WIDTH, CLASSES, TARGETS = 5, 3, 2  # of vectors

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": WINDOW, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_MAMBA = {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 8}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=WINDOW, bos_token_id=1, eos_token_id=2,
        **_NO_DROPOUT,
    ),
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, **_MAMBA),
}  # fmt: skip
_NO_TOKENS = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FAMILIES_OF_VECTORS = {
    "llama": lambda: LlamaConfig(
        **_NO_TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2,
    ),
    "gpt2": lambda: GPT2Config(
        **_NO_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **_NO_DROPOUT
    ),
    "mamba": lambda: MambaConfig(**_NO_TOKENS, **_MAMBA, initializer_range=0.2),
}  # fmt: skip
LABEL_SETS = {"single": [[7], [9], [30]], "several": [[7], [9, 11], [30, 31, 32]]}
VERBS = {"cat": "purrs", "dog": "barks", "owl": "hoots", "cow": "moos"}
ROWS = [{"text": f"{verb} " * (1 + i % 3) + str(i), "label": name} for i in range(5) for name, verb in VERBS.items()]


# ---------------------------------------------------------------- what is written


class Record:
    """What was found, under `MEMBER/PART/NAME`.

    Numbers that are not whole are kept as tensors, so that two trees are compared bitwise or by their difference.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def add(self, key: str, value: Any) -> None:
        """A tensor, a state, a number, what JSON holds, or a mapping of those."""
        if isinstance(value, TaskState):
            self.add(key, value.tensors | {"step": value.step, "num_tokens": value.num_tokens})
            self.values[f"{key}/kind"] = [value.accumulation, value.class_names, value.batch_size, value.nbytes]
        elif isinstance(value, dict):
            for name, part in value.items():
                self.add(f"{key}/{name}", part)
        elif isinstance(value, Tensor):
            self.tensors[key] = value.detach().clone().contiguous()
        elif isinstance(value, float):
            self.tensors[key] = torch.tensor(value, dtype=torch.double)
        else:
            self.values[key] = value

    def save(self, folder: Path) -> None:
        save_file(self.tensors, folder / TENSORS)
        values = {"values": self.values, "errors": self.errors, "seconds": self.seconds}
        (folder / VALUES).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")


def or_refused(action: Callable[[], Any]) -> Any:
    """What `action` gives, or that it was refused; the words of the error may differ between trees."""
    try:
        return action()
    except ValueError:
        return "refused"


# ---------------------------------------------------------------- what members read


class Subject(ABC):
    """A base, and what an adapter on it reads and is asked: always three chunks of two tasks.

    `defaults` are values of `IAIConfig`, `noise` is how far weights are moved, `refines` says whether queries refine
    their own prediction, and `curve` holds arguments of `evaluate_curve`.
    """

    defaults: dict = {}
    noise = 0.05
    refines = False
    curve: dict = {}

    @abstractmethod
    def base(self) -> PreTrainedModel:
        """The same for every call."""

    @abstractmethod
    def chunks(self) -> list[dict]:
        """With padding."""

    @abstractmethod
    def query(self) -> dict[str, Tensor]:
        """As many for each task."""

    @abstractmethod
    def labels(self) -> Tensor:
        """Of the queries."""

    @abstractmethod
    def episodes(self) -> list[dict]:
        """To train on: rows `{"support", "query"}`."""

    @abstractmethod
    def batch(self) -> dict[str, Tensor]:
        """An episode as `forward` takes it."""

    def tokenizer(self):
        """None: of vectors."""
        return None

    def load(self, folder: Path) -> PeftModel:
        return PeftModel.from_pretrained(self.base(), folder)

    def asked(self) -> dict[str, dict]:
        """Arguments of `refine`."""
        return {}


class Text(Subject):
    """Token ids for a family of causal language models."""

    vocab, size, query_size = VOCAB, 10, 6

    def __init__(self, family: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.family, self.dtype = family, dtype
        self.defaults = {"task_type": "CAUSAL_LM", "num_state_tokens": SLOTS, "r": 2, "target_modules": "all-linear"}
        self.curve = {"num_chunks": (0, 2), "chunk_size": 8}

    def base(self) -> PreTrainedModel:
        torch.manual_seed(0)
        attention = "eager" if self.family == "mamba" else "sdpa"
        model = AutoModelForCausalLM.from_config(FAMILIES[self.family](), attn_implementation=attention)
        for parameter in model.parameters():  # sharper predictions, which depend on what was read
            if parameter.dim() > 1:
                parameter.data.mul_(1.5 if self.family == "mamba" else 3.0)
        return model.to(self.dtype).eval()

    def ids(self, *shape: int, seed: int) -> Tensor:
        return torch.randint(5, self.vocab, shape, generator=torch.Generator().manual_seed(seed))

    def chunks(self) -> list[dict]:
        """The second is padded, and some tokens of the third have no loss."""
        chunks = [{"input_ids": ids} for ids in self.ids(2, 3 * self.size, seed=0).split(self.size, 1)]
        mask = torch.ones_like(chunks[1]["input_ids"])
        mask[1, -3:] = 0
        chunks[1]["attention_mask"] = mask
        chunks[2]["labels"] = chunks[2]["input_ids"].clone()
        chunks[2]["labels"][:, ::3] = -100
        return chunks

    def query(self) -> dict[str, Tensor]:
        ids = self.ids(2, self.query_size, seed=1)
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def labels(self) -> Tensor:
        query = self.query()
        return query["input_ids"].masked_fill(query["attention_mask"] == 0, -100)

    def batch(self) -> dict[str, Tensor]:
        query, chunks = self.ids(2, 2, 8, seed=2), self.ids(2, 3, self.size, seed=3)
        labels = chunks.clone()
        labels[:, :, ::3] = -100
        return {"input_ids": query, "labels": query, "chunk_input_ids": chunks, "chunk_labels": labels}

    def episodes(self) -> list[dict]:
        rows = self.ids(8, 40, seed=4).tolist()
        return [{"support": [{"input_ids": row[:32]}], "query": [{"input_ids": row[32:]}]} for row in rows]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


class EmbeddedText(Text):
    """Token ids for an adapter on the embedded base."""

    vocab, size, query_size = 1024, 64, 32

    def base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(hf_iai.embedded_base())

    def load(self, folder: Path) -> PeftModel:
        return AutoPeftModelForCausalLM.from_pretrained(folder)


class RefinedText(Text):
    """Token ids, where each query refines its own prediction; of training `label_set` names the answers, if any."""

    refines = True

    def __init__(self, family: str = "llama", label_set: str | None = None) -> None:
        super().__init__(family)
        self.label_set = label_set
        self.defaults = {"task_type": "CAUSAL_LM", "regime": "implicit", "r": 2, "target_modules": "all-linear"}

    def query(self) -> dict[str, Tensor]:
        ids = self.ids(4, self.query_size, seed=1)
        mask = torch.ones_like(ids)
        mask[3, :2] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def asked(self) -> dict[str, dict]:
        sets = {f"labels {name}": {"labels": labels} for name, labels in LABEL_SETS.items()}
        return {"free": {}, "free of three": {"num_answer_tokens": 3}} | sets

    def batch(self) -> dict[str, Tensor]:
        inputs = super().batch()
        ids, labels = inputs["input_ids"].clone(), torch.full_like(inputs["input_ids"], -100)
        answers = LABEL_SETS[self.label_set] if self.label_set else [[9, 11], [12, 13]]
        for row in range(4):
            answer = torch.tensor(answers[row % len(answers)])
            for tensor in (ids, labels):
                tensor.view(4, -1)[row, -len(answer) :] = answer
        inputs |= {"input_ids": ids, "labels": labels}
        return inputs | self._label_tensors()

    def _label_tensors(self) -> dict[str, Tensor]:
        if self.label_set is None:
            return {}
        labels, longest = LABEL_SETS[self.label_set], max(map(len, LABEL_SETS[self.label_set]))
        ids = torch.tensor([label + [0] * (longest - len(label)) for label in labels]).expand(2, -1, -1)
        return {"label_input_ids": ids, "label_attention_mask": (ids != 0).long()}

    def episodes(self) -> list[dict]:
        episodes = super().episodes()
        answers = LABEL_SETS[self.label_set] if self.label_set else [[9, 11], [12, 13]]
        for number, episode in enumerate(episodes):
            prompt, answer = episode["query"][0]["input_ids"][:4], answers[number % len(answers)]
            episode["query"] = [{"input_ids": prompt + answer, "labels": [-100] * 4 + answer}]
            episode |= {"labels": LABEL_SETS[self.label_set]} if self.label_set else {}
        return episodes


class LabelledTexts(Subject):
    """Labelled texts for a Bert and a linear state: of classes, or of real targets."""

    noise = 0.1

    def __init__(self, likelihood: str = "softmax", **sizes: int) -> None:
        self.likelihood = likelihood
        self.sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.sizes |= {"vocab_size": 400, "max_position_embeddings": 64} | sizes
        self.defaults = {"task_type": "SEQ_CLS", "state_type": "linear", "likelihood": likelihood, "r": 2}
        self.curve = {"num_chunks": (1, 2), "chunk_size": 4, "baselines": ("nearest_class_mean",)}

    def base(self) -> PreTrainedModel:
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_config(BertConfig(**self.sizes))
        for parameter in base.parameters():  # features that differ, and no weight at its first value
            parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0).add_(0.1 * torch.randn_like(parameter))
        return base.eval()

    def chunks(self) -> list[dict]:
        """Two streams; the second meets its classes in another order, and ends first."""
        streams = [chunk_examples(rows, self.tokenizer(), chunk_size=4) for rows in (ROWS[:11], ROWS[13:20])]
        chunks = list(batch_chunks(streams))
        if self.likelihood == "softmax":
            return chunks
        for seed, chunk in enumerate(chunks):
            shape = (*chunk["labels"].shape, TARGETS)
            chunk["labels"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            del chunk["label_names"]
        return chunks

    def query(self) -> dict[str, Tensor]:
        return dict(text_tokens([f"{verb} 77" for verb in VERBS.values()], self.tokenizer()))

    def labels(self) -> Tensor:
        if self.likelihood == "gaussian":
            return torch.randn(4, TARGETS, generator=torch.Generator().manual_seed(9))
        return torch.tensor([0, 1, 2, -100])

    def episodes(self) -> list[dict]:
        rows = [ROWS[start:] + ROWS[:start] for start in range(6)]
        return [{"support": row[:12], "query": row[12:15]} for row in rows]

    def batch(self) -> dict[str, Tensor]:
        streams = [self.chunks()[0], self.chunks()[1]]
        longest = max(chunk["input_ids"].shape[2] for chunk in streams)
        inputs = {}
        for name in ("input_ids", "attention_mask"):
            padded = [torch.nn.functional.pad(c[name], (0, longest - c[name].shape[2])) for c in streams]
            inputs[f"chunk_{name}"] = torch.stack(padded, 1)
            inputs[name] = self.query()[name].unflatten(0, (2, 2))
        inputs["chunk_labels"] = torch.stack([chunk["labels"] for chunk in streams], 1)
        return inputs | {"labels": self.labels().unflatten(0, (2, 2))}

    def tokenizer(self) -> ByT5Tokenizer:
        return ByT5Tokenizer()


class _VectorData(Subject):
    """Vectors of `width`, each with a class or real targets."""

    noise = 0.1

    def __init__(self, likelihood: str = "softmax", width: int = WIDTH) -> None:
        self.likelihood, self.width = likelihood, width
        baselines = ("nearest_class_mean",) if likelihood == "softmax" else ()
        self.curve = {"num_chunks": (1, 2), "chunk_size": 4, "baselines": baselines}

    def examples(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num, self.width, generator=generator)
        if self.likelihood == "softmax":
            return x, (torch.arange(num) + seed) % CLASSES
        return x, torch.randn(num, TARGETS, generator=generator)

    def chunks(self) -> list[dict]:
        """Of the second stream the last is missing."""
        streams = [chunk_vectors(*self.examples(num, seed), chunk_size=6) for num, seed in ((16, 0), (9, 1))]
        return list(batch_chunks(streams))

    def query(self) -> dict[str, Tensor]:
        return {"inputs_embeds": self.examples(4, seed=2)[0]}

    def labels(self) -> Tensor:
        return self.examples(4, seed=2)[1]

    def batch(self) -> dict[str, Tensor]:
        (x, y), (asked, labels) = self.examples(24, seed=3), self.examples(6, seed=4)
        chunks = {"chunk_inputs_embeds": x.unflatten(0, (2, 3, 4)), "chunk_labels": y.unflatten(0, (2, 3, 4))}
        return chunks | {"inputs_embeds": asked.unflatten(0, (2, 3)), "labels": labels.unflatten(0, (2, 3))}

    def episodes(self) -> list[dict]:
        episodes = []
        for seed in range(6):
            x, y = self.examples(15, seed=10 + seed)
            rows = [{"vector": v, "label": t} for v, t in zip(x.tolist(), y.tolist(), strict=True)]
            episodes.append({"support": rows[:12], "query": rows[12:]})
        return episodes


class GivenVectors(_VectorData):
    """Vectors for a linear state, on the base without layers or in place of the embeddings of a Bert."""

    def __init__(self, likelihood: str = "softmax", width: int = WIDTH, encoder: LabelledTexts | None = None) -> None:
        super().__init__(likelihood, width)
        self.encoder = encoder
        self.defaults = {"task_type": "SEQ_CLS", "state_type": "linear", "likelihood": likelihood, "r": 2}

    def base(self) -> PreTrainedModel:
        return hf_iai.vector_base(self.width) if self.encoder is None else self.encoder.base()


class Vectors(_VectorData):
    """Vectors that a causal language model reads as tokens, or that a small network answers about."""

    def __init__(self, likelihood: str = "softmax", family: str = "llama", *, refines: bool = False) -> None:
        super().__init__(likelihood)
        self.family, self.refines = family, refines
        self.defaults = {"vector_width": WIDTH, "num_outputs": CLASSES if likelihood == "softmax" else TARGETS}
        self.defaults |= {"task_type": "CAUSAL_LM", "likelihood": likelihood, "r": 4}
        if refines:
            self.defaults |= {"regime": "implicit", "target_modules": "all-linear"}
        else:
            self.defaults |= {"num_state_tokens": SLOTS}

    def base(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES_OF_VECTORS[self.family]()).eval()

    def asked(self) -> dict[str, dict]:
        return {"": {}}


# ---------------------------------------------------------------- the members


@dataclass(frozen=True)
class Member:
    """An adapter of a configuration, or a published one.

    Args:
        training: arguments of a short training run; None: it is not trained.
    """

    name: str
    subject: Subject
    config: dict = field(default_factory=dict)
    adapter: Path | None = None
    training: dict | None = None

    def model(self) -> PeftModel:
        """As training would start."""
        if self.adapter is not None:
            return self.subject.load(self.adapter)
        base = self.subject.base()
        torch.manual_seed(1)
        values = self.subject.defaults | self.config
        if values.get("head") == "path_aware":
            values = {"path_window": 2} | values
        if values.get("state_type") == "lora":
            values = {"state_r": 2} | values
        return get_peft_model(base, IAIConfig(**values))

    def moved_model(self) -> PeftModel:
        """With noise on all that is saved, so that parts which start at zero have an effect; a published one as it is.

        The noise depends on names alone, not on the order of parameters.
        """
        model = self.model()
        if self.adapter is None:
            for name, tensor in get_peft_model_state_dict(model).items():  # these share their memory with parameters
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                tensor.add_(self.subject.noise * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
        return model.eval()


def members(tree: Path) -> Iterator[Member]:
    yield from _published(tree / "adapters")
    yield from _text()
    yield from _text_variants()
    yield from _objectives()
    yield from _linear()
    yield from _vectors()
    yield from _refined()


def _published(folder: Path) -> Iterator[Member]:
    for path in sorted(path.parent for path in folder.glob("*/adapter_config.json")):
        config = json.loads((path / "adapter_config.json").read_text())
        base = config["base_model_name_or_path"]
        if base == "hf_iai:embedded":
            subject = EmbeddedText()
        elif base.startswith("hf_iai:vectors-"):
            subject = GivenVectors(width=int(base.removeprefix("hf_iai:vectors-")))
        elif config["task_type"] == "SEQ_CLS":  # an encoder that may not be here: another one of its width
            subject = LabelledTexts(hidden_size=384, num_attention_heads=12)
        else:  # a large base that may not be here
            continue
        yield Member(f"published {path.name}", subject, adapter=path)


HEADS = {
    "observations": ("gated",),
    "gradients": ("learned_optimizer", "sgd", "meta_sgd", "path_aware"),
    "both": ("gated",),
}


def _text() -> Iterator[Member]:
    for family, state, regime in product(FAMILIES, ("prefix", "prompt", "lora"), ("explicit", "parametric")):
        if (family, state) == ("mamba", "prefix"):  # it has no keys and values
            continue
        for signal, heads in HEADS.items():
            for head in heads:
                values = {"state_type": state, "regime": regime, "signal": signal, "head": head}
                trained = family == "llama" and regime == "explicit" and head == heads[0]
                name = f"text {family} {state} {signal} {head} {regime}"
                yield Member(name, Text(family), values, training={} if trained else None)


def _text_variants() -> Iterator[Member]:
    own = {"momentum_decays": [0.2, 0.8], "second_decays": [0.5], "hidden": 8, "doubt": 0.5}
    variants = {
        "recent": {"accumulation": "recent"},
        "recent pin_bos": {"accumulation": "recent", "pin_bos": True},
        "recent of a prompt": {"accumulation": "recent", "state_type": "prompt"},
        "kept tokens": {"num_kept_tokens": 2},
        "delta rule": {"delta_rule": True},
        "delta rule of both": {"delta_rule": True, "signal": "both"},
        "no correction": {"correction": False},
        "no correction of a prompt": {"correction": False, "state_type": "prompt"},
        "no correction of a lora": {"correction": False, "state_type": "lora"},
        "second order": {"second_order": True, "signal": "gradients", "state_type": "prompt"},
        "second order of a lora": {"second_order": True, "signal": "gradients", "state_type": "lora", "head": "sgd"},
        "second order of both": {"second_order": True, "signal": "both"},
        "lora of all": {"state_type": "lora", "state_target_modules": "all-linear"},
        "lora of all by gradients": {
            "state_type": "lora", "state_target_modules": "all-linear", "signal": "gradients", "initial_rate": 0.3,
        },
        "own learned optimizer": {"signal": "gradients", "state_type": "prompt", "learned_optimizer": own},
    }  # fmt: skip
    for (name, values), regime in product(variants.items(), ("explicit", "parametric")):
        training = {} if regime == "explicit" else None
        yield Member(f"text variant {name} {regime}", Text(), {"regime": regime} | values, training=training)
    for name, values in {"prefix": {}, "lora by gradients": {"state_type": "lora", "signal": "gradients"}}.items():
        yield Member(f"text variant bfloat16 {name}", Text(dtype=torch.bfloat16), values)


def _objectives() -> Iterator[Member]:
    ways = {
        "truncated": {"objective": "truncated", "truncation_window": 2},
        "greedy": {"objective": "greedy"},
        "last": {"scored_states": "last", "min_chunks": 4, "halve_chunks": 0.0},
        "teacher": {"kl_weight": 0.5},
        "rate of the start": {"state_learning_rate": 3e-2},
        "halves and curriculum": {"halve_chunks": 1.0, "curriculum": 1.0},
    }
    for name, training in ways.items():
        yield Member(f"text objective {name}", Text(), training=training)
    yield Member("refined text objective greedy", RefinedText(), training={"objective": "greedy"})


def _linear() -> Iterator[Member]:
    for likelihood, regime, pooling in product(("softmax", "gaussian"), ("parametric", "explicit"), ("mean", "cls")):
        texts, values = LabelledTexts(likelihood), {"regime": regime, "pooling": pooling}
        training = {} if (likelihood, pooling) == ("softmax", "mean") else None  # rows of texts have classes
        yield Member(f"linear {likelihood} text {pooling} {regime}", texts, values, training=training)
    for likelihood in ("softmax", "gaussian"):
        encoder = LabelledTexts(likelihood)
        yield Member(f"linear {likelihood} vectors", GivenVectors(likelihood), training={})
        subject = GivenVectors(likelihood, 32, encoder)
        yield Member(f"linear {likelihood} vectors of an encoder", subject, {"regime": "explicit"}, training={})
    no_intercept = {"fit_intercept": False}
    yield Member("linear gaussian vectors no intercept", GivenVectors("gaussian"), no_intercept, training={})
    yield Member("linear gaussian text no intercept", LabelledTexts("gaussian"), no_intercept)


def _vectors() -> Iterator[Member]:
    for likelihood, state in product(("softmax", "gaussian"), ("prefix", "prompt", "lora", "mlp")):
        values = {"state_type": state, "target_modules": "all-linear"}
        yield Member(f"vectors {likelihood} {state} observations", Vectors(likelihood), values, training={})
    for likelihood, head in product(("softmax", "gaussian"), HEADS["gradients"]):
        values = {"state_type": "mlp", "signal": "gradients", "head": head}
        training = {} if head == "learned_optimizer" else None
        yield Member(f"vectors {likelihood} mlp gradients {head}", Vectors(likelihood), values, training=training)
    values = {"state_type": "mlp", "signal": "gradients", "head": "sgd", "second_order": True}
    yield Member("vectors gaussian mlp gradients second order", Vectors("gaussian"), values, training={})
    for family, state in (("gpt2", "prefix"), ("gpt2", "mlp"), ("mamba", "prompt"), ("mamba", "mlp")):
        values = {"state_type": state, "target_modules": "all-linear"}
        yield Member(f"vectors {family} {state} observations", Vectors(family=family), values)


def _refined() -> Iterator[Member]:
    for prediction in ("logits", "probabilities", "latent"):
        values = {"prediction": prediction}
        yield Member(f"refined text llama {prediction} free", RefinedText(), values, training={})
        for labels in LABEL_SETS:
            if (prediction, labels) != ("latent", "several"):  # latents say one token at a time
                subject = RefinedText(label_set=labels)
                yield Member(f"refined text llama {prediction} {labels}", subject, values, training={})
        classes = Vectors(refines=True)
        yield Member(f"refined vectors llama softmax {prediction}", classes, values, training={})
    for family in ("qwen3", "gpt2"):
        yield Member(f"refined text {family} logits several", RefinedText(family, "several"))
    yield Member("refined vectors llama gaussian", Vectors("gaussian", refines=True), training={})
    yield Member("refined vectors gpt2 gaussian", Vectors("gaussian", "gpt2", refines=True))


# ---------------------------------------------------------------- what is found of a member


def probe(member: Member, add: Callable[[str, Any], None], *, training: bool = True) -> None:
    """All that is compared of a member, with `add("PART/NAME", value)`."""
    started = member.model()
    add("keys/parameters", [name for name, p in started.named_parameters() if p.requires_grad])
    saved = get_peft_model_state_dict(started)
    add("keys/saved", {name: [str(t.dtype), *t.shape] for name, t in saved.items()})
    add("keys/start", saved)
    model = member.moved_model()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = member.subject.load(Path(folder)).eval()
        _identity(model, loaded, Path(folder), add)
    (_refine if member.subject.refines else _adapt)(member.subject, model, loaded, add)
    torch.manual_seed(2)
    with torch.no_grad():
        outputs = model(**member.subject.batch())
    add("logits/episode", {"logits": outputs.logits, "loss": outputs.loss})
    _gradients(member.subject, model, add)
    if member.training is not None and training:
        _curve(member.subject, member.moved_model(), add)
        _train(member, add)


def _identity(model: PeftModel, loaded: PeftModel, folder: Path, add: Callable) -> None:
    tuner = model.base_model
    add("fingerprint/of the model", [tuner.identity.fingerprint, tuner.identity.name])
    add("fingerprint/of the loaded", [loaded.base_model.identity.fingerprint, loaded.base_model.identity.name])
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_version"]
    for name in ("target_modules", "exclude_modules", "state_target_modules"):  # in any order
        config[name] = sorted(value) if isinstance(value := config.get(name), list) else value
    add("fingerprint/adapter_config", config)
    add("fingerprint/sizes", [or_refused(lambda: tuner.max_chunk_size), tuner.num_slots, tuner.window])


def _adapt(subject: Subject, model: PeftModel, loaded: PeftModel, add: Callable) -> None:
    """States after reading in every way, and answers under them."""
    chunks, query = subject.chunks(), subject.query()
    start, states = model.initial_state(2), list(model.adapt_steps(chunks))
    last = states[-1]
    add("states/start", start)
    add("states/after 1", states[0])
    add("states/after 3", last)
    add("states/in parallel", model.adapt(chunks, parallel=3))
    add("states/continued", model.adapt(chunks[1:], state=states[0]))
    add("states/merged", or_refused(lambda: TaskState.merge([states[0], model.adapt(chunks[1:])])))
    add("states/stacked", TaskState.stack([last.select(1), states[0].select(0)]))
    with TemporaryDirectory() as folder:
        last.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        again = TaskState.from_pretrained(folder)
    add("fingerprint/of the state", [config.pop("fingerprint"), config.pop("name")])
    add("states/config", config)
    add("states/loaded", again)
    add("states/of the loaded model", loaded.adapt(chunks))
    with torch.no_grad():
        outputs = model(**query, labels=subject.labels(), task_state=last)
        add("logits/after 3", {"logits": outputs.logits, "loss": outputs.loss})
        add("logits/of one task", model(**query, task_state=last.select(0)).logits)
        add("logits/at the start", model(**query, task_state=start).logits)
        add("logits/of the loaded", loaded(**query, task_state=again).logits)
        with model.using(states[0]):
            add("logits/after 1", model(**query).logits)
        _without(model, query, add)
    _generate(model, query, last, add)
    if model.active_peft_config.task_type == "CAUSAL_LM":  # of a linear state it has no meaning
        add("logits/effect", or_refused(lambda: model.base_model.state_effect(last, query)))


def _refine(subject: Subject, model: PeftModel, loaded: PeftModel, add: Callable) -> None:
    """Predictions before the first chunk and after each."""
    chunks, query = subject.chunks(), subject.query()
    for name, asked in subject.asked().items():
        for whose, one in (("", model), ("of the loaded ", loaded)):
            steps = or_refused(lambda asked=asked, one=one: list(one.refine(chunks, query, with_start=True, **asked)))
            add(f"logits/refined {whose}{name}", steps if steps == "refused" else torch.stack(steps))
    _without(model, query, add)
    _generate(model, query, None, add)


@torch.no_grad()
def _without(model: PeftModel, query: dict, add: Callable) -> None:
    """What is answered without a state."""
    add("logits/without a state", or_refused(lambda: model(**query).logits))
    with model.disable_adapter():
        add("logits/without the adapter", or_refused(lambda: model(**query).logits))


def _generate(model: PeftModel, query: dict, state: TaskState | None, add: Callable) -> None:
    if "input_ids" in query and model.active_peft_config.task_type == "CAUSAL_LM":
        under = {} if state is None else {"task_state": state}
        few = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        add("logits/generated", model.generate(**query, **under, **few))


def _gradients(subject: Subject, model: PeftModel, add: Callable) -> None:
    """Loss of an episode in training, and the length of every parameter's gradient."""
    torch.manual_seed(2)
    loss = model.train()(**subject.batch()).loss
    add("gradients/loss", loss)
    if loss.requires_grad:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    add("gradients/none", sorted(name for name, gradient in found.items() if gradient is None))
    add("gradients/norms", {name: gradient.norm() for name, gradient in found.items() if gradient is not None})
    model.zero_grad(set_to_none=True)
    model.eval()


def _curve(subject: Subject, model: PeftModel, add: Callable) -> None:
    tokenizer = subject.tokenizer()
    episodes = [episode | {"query": episode["query"][:1]} for episode in subject.episodes()[:2]]
    ask = partial(evaluate_curve, model, episodes, tokenizer=tokenizer, show_progress=False, **subject.curve)
    curve = or_refused(ask)
    if curve != "refused":
        curve = {str(key): torch.from_numpy(losses) for key, losses in curve.losses.items()}
    add("logits/curve", curve)


def _train(member: Member, add: Callable) -> None:
    """Losses and parameters of three seeded steps, and the curve after them."""
    subject, model = member.subject, member.moved_model()
    with TemporaryDirectory() as folder:
        values = {
            "output_dir": folder, "chunk_size": subject.curve["chunk_size"], "max_chunks": 4, "max_steps": 3,
            "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "curriculum": 0.0, "eval_chunks": (0, 1, 2),
        }  # fmt: skip
        trainer = IAITrainer(
            model,
            IAITrainingArguments(**(values | member.training)),
            train_dataset=subject.episodes(),
            eval_dataset=subject.episodes()[:2],
            processing_class=subject.tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
    add("training/losses", torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    add("training/evaluated", {name: value for name, value in metrics.items() if "loss" in name})
    add("training/saved", get_peft_model_state_dict(model))


# ---------------------------------------------------------------- the command


def main(
    tree: Annotated[Path, typer.Option(help="The tree whose package must have been imported.")],
    output: Annotated[Path, typer.Option(help="Folder for what was found.")],
    only: Annotated[str, typer.Option(help="Members whose name holds this.")] = "",
    training: Annotated[bool, typer.Option(help="Train too.")] = True,
) -> None:
    """Write what this tree says of every member."""
    if not Path(hf_iai.__file__).resolve().is_relative_to(tree.resolve()):
        raise typer.BadParameter(f"the package comes from {hf_iai.__file__}, not from {tree}: set PYTHONPATH={tree}")
    torch.set_num_threads(1)
    record, chosen = Record(), [member for member in members(tree) if only in member.name]
    print(f"members {len(chosen)}", flush=True)
    for member in chosen:
        started = perf_counter()
        try:
            probe(member, lambda key, value, name=member.name: record.add(f"{name}/{key}", value), training=training)
        except Exception as error:  # the others go on, and the comparison says so
            at = traceback.extract_tb(error.__traceback__)[-1]
            record.errors[member.name] = f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
        record.seconds[member.name] = round(perf_counter() - started, 3)
        print(f"done {member.name}", flush=True)
    record.save(output)


if __name__ == "__main__":
    typer.run(main)
