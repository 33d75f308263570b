"""Remarks on whether vLLM's documented limits let it serve a plain LoRA."""

from peft import LoraConfig

# The values that vLLM's `--max-lora-rank` accepts; the rank of an adapter may be lower.
RANKS, DEFAULT_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16
OUTPUT_LAYERS = ("lm_head", "embed_out")


def vllm_remarks(adapter: LoraConfig) -> list[str]:
    """A remark on the adapter's rank, and one on each feature that vLLM does not serve, or not for every model.

    Example:
        >>> from peft import LoraConfig
        >>> from hf_iai.export.vllm import vllm_remarks
        >>> vllm_remarks(LoraConfig(r=24, target_modules=["q_proj"]))
        ['vLLM: rank 24 needs `--max-lora-rank 32`; the default is 16.']

    Source: https://docs.vllm.ai, `vllm.config.lora`, `vllm.lora.peft_helper` and the table of supported models.
    """
    remarks = [_of_rank(max(adapter.r, *adapter.rank_pattern.values(), 0))]
    refused = {"bias": adapter.bias != "none", "DoRA": adapter.use_dora, "modules_to_save": adapter.modules_to_save}
    remarks += [f"vLLM: {name} is refused." for name, used in refused.items() if used]
    if output := sorted(name for name in adapter.target_modules if name.split(".")[-1] in OUTPUT_LAYERS):
        remarks.append(f"vLLM: `{output[0]}`, which this adapter changes, takes LoRA for some models only.")
    if adapter.fan_in_fan_out:
        remarks.append("vLLM: its layers are `Conv1D`, as GPT-2 has them; LoRA is for models with linear ones.")
    return remarks


def _of_rank(rank: int) -> str:
    most = next((most for most in RANKS if most >= rank), None)
    if most is None:
        return f"vLLM: rank {rank} is above {RANKS[-1]}, its largest, so it cannot serve this adapter."
    if most > DEFAULT_RANK:
        return f"vLLM: rank {rank} needs `--max-lora-rank {most}`; the default is {DEFAULT_RANK}."
    return f"vLLM: rank {rank} fits its default `--max-lora-rank {DEFAULT_RANK}`."
