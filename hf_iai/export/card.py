"""The README of an export: what it is, and how to load it without hf_iai."""

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig, PromptLearningConfig

from ..config import IAIConfig
from ..hub.cards import base_in_words, base_on_hub
from ..state import TaskState
from ..tasks import task_of
from .vllm import vllm_remarks

NOTICE = "<!-- Written by hf_iai.export_to_peft, which replaces this folder when asked to write to it again. -->"

NAMED = """
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")
"""
BESIDE = """
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}/base")  # on the Hub: ("OWNER/{name}", subfolder="base")
model = PeftModel.from_pretrained(base, "{adapter}")  # on the Hub: (base, "OWNER/{name}"{subfolder})
"""
OF_TWO_PARTS = """
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}/lora{task}").merge_and_unload()  # what the text is like
model = PeftModel.from_pretrained(model, "{name}/prefix{task}")  # what was just said
"""
VLLM = "vLLM serves the LoRA alone, without the virtual tokens."
MOVING = (
    '`AutoPeftModelForCausalLM.from_pretrained("{adapter}")` does the same in one step while this folder lies where it '
    "was written: `adapter_config.json` names the base by its absolute path, since PEFT knows no path relative to the "
    "adapter. After moving the folder load it as above, or put the base's new path there."
)


def export_card(
    config: IAIConfig,
    adapter: PeftConfig,
    state: TaskState,
    *,
    name: str,
    dtype: str,
    has_base: bool,
    slots: PromptLearningConfig | None = None,
) -> ModelCard:
    """The card of an export.

    Args:
        config: configuration of the adapter that made the state.
        adapter: PEFT's configuration of the export.
        state: the exported state of B tasks.
        name: name of the export's folder.
        dtype: type of the exported values.
        has_base: whether the predictor was written to `base`.
        slots: PEFT's configuration of the slots, if the state has two parts; `adapter` is then that of the LoRA.
    """
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=task_of(config).pipeline_tag,
        base_model=base_on_hub(config),
        tags=["hf_iai", "task-state"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n{NOTICE}\n# {name}",
        "What was learned from reading a task, as a plain PEFT adapter: it needs `peft` and `transformers` only.",
        _bullets(_facts(config, adapter, state, dtype, slots)),
        "## Use",
        _use(name, state.batch_size, has_base) if slots is None else _use_both(name, state.batch_size, adapter),
        "## Limits",
        _bullets(_limits(config, adapter, dtype, has_base) + ([] if slots is None else [VLLM, *_limits_of_slots()])),
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _facts(config: IAIConfig, adapter: PeftConfig, state: TaskState, dtype: str, slots: PeftConfig | None) -> list[str]:
    read = [f"{n} tokens in {k} chunks" for n, k in zip(state.num_tokens.tolist(), state.step.tolist(), strict=True)]
    tasks = "" if state.batch_size == 1 else f"; one adapter per task, in `0` to `{state.batch_size - 1}`"
    answers = "the base with the adapter's LoRA merged" if config.lora_answers else "the bare base"
    if isinstance(adapter, LoraConfig):
        joined = config.lora_answers
        size = f"rank {adapter.r}" + (f", {config.state_r} of it the task's and the rest the predictor's" * joined)
        answers = "the base with this adapter"
        if slots is not None:
            size += f", and {slots.peft_type.value}, {slots.num_virtual_tokens} virtual tokens"
    else:
        size = f"{adapter.num_virtual_tokens} virtual tokens"
    return [
        f"Method: {adapter.peft_type.value}, {size}, {dtype}{tasks}",
        f"Made by: `{state.identity.name}`, a {config.state_type} state; identity `{state.identity.fingerprint}`",
        f"Read: {', '.join(read)}",
        f"Base: {base_in_words(config)}; {answers} answers",
    ]


def _use(name: str, num_tasks: int, has_base: bool) -> str:
    adapter, subfolder = (name, "") if num_tasks == 1 else (f"{name}/0", ', subfolder="0"')
    places = {"name": name, "adapter": adapter, "subfolder": subfolder}
    code = f"```python{(BESIDE if has_base else NAMED).format(**places)}```"
    return f"{code}\n\n{MOVING.format(**places)}" if has_base else code


def _use_both(name: str, num_tasks: int, adapter: PeftConfig) -> str:
    task, base = "" if num_tasks == 1 else "/0", adapter.base_model_name_or_path
    return f"```python{OF_TWO_PARTS.format(base=base, name=name, task=task)}```"


def _limits(config: IAIConfig, adapter: PeftConfig, dtype: str, has_base: bool) -> list[str]:
    method, merged = adapter.peft_type.value, has_base and config.lora_answers
    limits = ["It cannot read any further: read on with the adapter that made the state, and export again."]
    if isinstance(adapter, LoraConfig):
        limits += ["`base` holds the weights of the base: its licence holds for them."] * has_base
        return limits + vllm_remarks(adapter)
    limits += _limits_of_slots()
    if method == "PROMPT_TUNING":
        limits.append(f"The first {adapter.num_virtual_tokens} rows of `logits` belong to the virtual tokens.")
    if merged and dtype != "float32":
        limits.append(f"Merging rounded the weights to {dtype}: answers are those of the adapter up to that rounding.")
    if has_base:
        limits.append("`base` holds the weights of the base: its licence holds for them.")
    return limits


def _limits_of_slots() -> list[str]:
    return [
        "PEFT places queries that are padded on the left wrongly: pad on the right, and generate for one query, or for "
        "queries of one length, at a time.",
        "The virtual tokens take part of the base's window, and slide out of layers that have a shorter one.",
    ]


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
