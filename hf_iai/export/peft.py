"""Export of a task state as a plain PEFT adapter, which loads without hf_iai."""

import copy
import os
from pathlib import Path

import torch
from peft import CartridgeConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..bases.compat import has_recurrent_layers, key_value_shape
from ..bases.hub_ids import is_hub_id
from ..bases.prefixes import MaskedPrefix
from ..config import IAIConfig
from ..embedded import is_embedded_base
from ..files import check_replaceable, replace_folder
from ..model import IAIModel
from ..registry import STATES
from ..state import TaskState
from .card import export_card
from .lora import lora_adapters

CONFIGS = {
    "PROMPT_TUNING": PromptTuningConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "CARTRIDGE": CartridgeConfig,
}
# Their cache has another name, so PEFT takes every step of generate for the first one.
WRONG_IN_PEFT = ("mamba", "mamba2", "falcon_mamba")
CARD, BASE = "README.md", "base"
PARTS = ("lora", "prefix")  # the folders of a state of two parts
Adapter = tuple[PeftConfig, dict[str, Tensor]]


def export_to_peft(
    model: PeftModel, state: TaskState, path: str | os.PathLike, *, peft_type: str | None = None
) -> None:
    """Write a state, as a query sees it, as an adapter that PEFT can load and use without hf_iai.

    A state of several tasks gives one adapter per task: `path/0`, `path/1`, ... `path/README.md` says how to load them.

    The export also contains the predictor, `path/base`, if no name alone can load it: in regime explicit (with the LoRA
    merged), on the embedded base, or on a base that is neither a folder nor on the Hub. With a lora state, regime
    explicit needs no `path/base`, since the adapter itself contains the predictor's LoRA.

    A prefix+lora state becomes two adapters, `path/lora` and `path/prefix`: the base takes up the first, and then the
    second, as `path/README.md` shows.

    Args:
        model: the IAI model that made the state. It does not change.
        state: the state of B tasks.
        path: a folder that is new, empty or an earlier export. An earlier export is replaced when the new one is
            complete.
        peft_type: `"PROMPT_TUNING"` (prompt states), `"PREFIX_TUNING"` or `"CARTRIDGE"` (prefix and prompt states, and
            the slots of a prefix+lora state), or `"LORA"` (lora states). None: the first of them that is possible for
            the state type.

    Raises:
        ValueError: if the model is no IAI model, the state belongs to another base or adapter, the state cannot become
            this type, PEFT generates wrongly on the base, or the base cannot be written.
        FileExistsError: if `path` is a link, or contains something else than an earlier export.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import AutoPeftModelForCausalLM, get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_iai import IAIConfig, embedded_base, export_to_peft
        >>> base = AutoModelForCausalLM.from_pretrained(embedded_base())
        >>> model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        >>> with TemporaryDirectory() as folder:
        ...     export_to_peft(model, model.initial_state(), folder)
        ...     AutoPeftModelForCausalLM.from_pretrained(folder).active_peft_config.peft_type.value
        'PREFIX_TUNING'
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, IAIModel):
        raise ValueError(f"export_to_peft needs an IAI model, got {type(model).__name__}: pass the one of the state")
    config, path = model.active_peft_config, Path(os.path.abspath(path))
    tuner.task.check_can("export_to_peft")
    if "peft" not in tuner.task.exports or not STATES[config.state_type].exports:
        raise ValueError(
            f"{tuner.task.called(config)} cannot become a PEFT adapter: keep the state with state.save_pretrained"
        )
    peft_type = _checked_type(peft_type, config, tuner.model.config)
    check_replaceable(path)
    adapters = _adapters(tuner, state, peft_type)
    name = _name_of_base(config)
    if name is None:
        _check_writable(tuner, config)
    # With an absolute path, the export loads from any working directory on this machine.
    named = os.path.abspath(name) if name and os.path.isdir(name) else name

    def write(new: Path) -> None:
        if name is None:
            _write_base(tuner, config, new / BASE)
        for folder, tasks in adapters.items():
            for adapter, _ in tasks:
                adapter.base_model_name_or_path = named or str(path / BASE)
                adapter.revision = config.revision if name else None
            _write_adapters(tasks, new / folder)
        (adapter, weights), *slots = (tasks[-1] for tasks in adapters.values())
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        slots = slots[0][0] if slots else None
        card = export_card(config, adapter, state, name=path.name, dtype=dtype, has_base=name is None, slots=slots)
        card.save(new / CARD)

    replace_folder(path, write)


def _checked_type(peft_type: str | None, config: IAIConfig, base: PreTrainedConfig) -> str:
    possible = STATES[config.state_type].exports
    of_tokens = possible != ("LORA",)
    if base.model_type in WRONG_IN_PEFT and of_tokens:
        raise ValueError(
            f"PEFT generates wrongly behind virtual tokens on {base.model_type!r}: answer with hf_iai instead"
        )
    if has_recurrent_layers(base) and of_tokens:
        possible = ("PROMPT_TUNING",)  # not all layers have keys and values
    peft_type = possible[0] if peft_type is None else getattr(peft_type, "value", peft_type)
    if peft_type not in possible:
        why = ", since 'LORA' needs a lora state" if peft_type == "LORA" else ""
        raise ValueError(
            f"a {config.state_type} state of {base.model_type!r} cannot become {peft_type!r}{why}: "
            f"pass one of {list(possible)}"
        )
    return peft_type


# ---------------------------------------------------------------- the adapter


def _adapters(tuner: IAIModel, state: TaskState, peft_type: str) -> dict[str, list[Adapter]]:
    """The adapter of each task, by the folder inside the export: "." unless a state has two parts."""
    parts = {}
    if STATES[tuner.task.config.state_type].updates_weights:
        parts["lora"] = lora_adapters(tuner, state)
    if peft_type != "LORA":
        tables = _virtual_tokens(tuner, state, peft_type)
        parts["prefix"] = [(_adapter_config(tuner, peft_type, t), {"prompt_embeddings": t}) for t in tables]
    return parts if len(parts) == len(PARTS) else {".": next(iter(parts.values()))}


@torch.no_grad()
def _virtual_tokens(tuner: IAIModel, state: TaskState, peft_type: str) -> list[Tensor]:  # B of (m, columns)
    """PEFT's `prompt_embeddings` for every task, in the type in which the base reads them, without empty slots."""
    state, reader = tuner.checked_state(state), tuner.reader
    base = reader.base
    with reader.frozen(), base.lora(tuner.task.config.lora_answers):
        if peft_type == "PROMPT_TUNING":
            rows = tuner.core.corrected(base, state)["prompt"][:, 0, 0]  # (B, m, d)
        else:
            with tuner.core.under(base, state) as prefix:
                layers = [torch.stack(pair, 1) for pair in prefix]  # (B, 2, H, m, D) each
            rows = torch.stack(layers, 1).permute(0, 4, 1, 2, 3, 5).flatten(2)  # (B, m, L * 2 * H * D)
            if isinstance(prefix, MaskedPrefix):
                rows = [row[filled != 0] for row, filled in zip(rows, prefix.mask, strict=True)]
    if not all(map(len, rows)):
        raise ValueError("a task has read nothing, so none of its slots can be exported: let it read a chunk first")
    return [row.to("cpu", tuner.model.dtype).contiguous() for row in rows]


def _adapter_config(tuner: IAIModel, peft_type: str, table: Tensor) -> PromptLearningConfig:  # (m, columns)
    own = {"token_dim": table.shape[1]}
    if peft_type != "PROMPT_TUNING":
        num_layers, num_heads, width = key_value_shape(tuner.model.config)
        own = {"num_layers": num_layers, "num_attention_heads": num_heads, "token_dim": num_heads * width}
    if peft_type == "CARTRIDGE":
        own["num_frozen_tokens"] = 0
    return CONFIGS[peft_type](
        task_type="CAUSAL_LM",
        inference_mode=True,
        num_virtual_tokens=len(table),
        num_transformer_submodules=1,
        **own,
    )


def _write_adapters(tasks: list[Adapter], folder: Path) -> None:
    for index, (adapter, weights) in enumerate(tasks):
        own = folder if len(tasks) == 1 else folder / str(index)
        adapter.save_pretrained(own)
        save_file(weights, own / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


# ---------------------------------------------------------------- the base beside it


def _name_of_base(config: IAIConfig) -> str | None:
    """The name by which a process without hf_iai can load the predictor. None if the predictor has to be written."""
    name = config.base_model_name_or_path
    if _is_merged(config) or is_embedded_base(name):
        return None
    return name if name and (os.path.isdir(name) or is_hub_id(name)) else None


def _is_merged(config: IAIConfig) -> bool:
    """Whether the predictor's LoRA is merged into the base. A lora state's adapter contains it instead."""
    return config.lora_answers and not STATES[config.state_type].updates_weights


def _check_writable(tuner: IAIModel, config: IAIConfig) -> None:
    base = tuner.model
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"regime={config.regime!r} on base {config.base_model_name_or_path!r} needs the base written beside the "
            "adapter, and this one is quantized: load it without quantization_config and read the chunks again"
        )
    tied = _is_merged(config) and base.config.tie_word_embeddings
    if tied and isinstance(base.get_output_embeddings(), LoraLayer):
        raise ValueError(
            f"target_modules={config.target_modules!r} puts LoRA on output embeddings that the base ties to its input: "
            "merged, it would change both; train an adapter that leaves them out"
        )


def _write_base(tuner: IAIModel, config: IAIConfig, folder: Path) -> None:
    """Write the predictor as a plain transformers model, with the tokenizer of the base's folder."""
    unwrapped(tuner, merged=_is_merged(config)).save_pretrained(folder)
    source = config.base_model_name_or_path
    if source and Path(source, "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def unwrapped(tuner: IAIModel, *, merged: bool) -> PreTrainedModel:
    tuner = _copy_in_main_memory(tuner)
    if not merged:
        return tuner.unload()
    return LoraModel.merge_and_unload(tuner, adapter_names=tuner.active_adapters)


def _copy_in_main_memory(module: nn.Module) -> nn.Module:
    """A copy on the CPU, which takes no memory of the accelerator."""
    memo = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b.detach().to("cpu", copy=True) for b in module.buffers()}
    return copy.deepcopy(module, memo)
