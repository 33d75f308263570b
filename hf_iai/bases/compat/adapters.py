"""How PEFT finds the tensors of an adapter among those of a model, and how they are checked when they are loaded."""

from collections.abc import Mapping

from peft.tuners import tuners_utils
from peft.utils import save_and_load
from torch import Tensor, nn


def tell_adapters_by_place() -> None:
    """Let PEFT tell the tensors of adapters apart by where a name stands, not by whether it stands somewhere.

    PEFT leaves a tensor out of a saved adapter if any part of its path equals the name of another adapter. So beside an
    adapter called "0" or "mlp" it would leave nearly all of them out.
    """
    original = save_and_load._filter_state_dict_for_adapter_name

    def by_place(state_dict: dict[str, Tensor], unwanted_adapter_names: list[str]) -> dict[str, Tensor]:
        placed = {key: t for key, t in state_dict.items() if adapter_of(key) is not None}
        others = original({key: t for key, t in state_dict.items() if key not in placed}, unwanted_adapter_names)
        found = {key for key in placed if adapter_of(key) not in unwanted_adapter_names} | others.keys()
        return {key: t for key, t in state_dict.items() if key in found}

    save_and_load._filter_state_dict_for_adapter_name = by_place


def adapter_of(key: str) -> str | None:
    """The adapter that a tensor belongs to, from its path in a model; None if it belongs to no LoRA or IAI adapter."""
    return split_adapter(key)[0]


def split_adapter(key: str) -> tuple[str | None, str]:
    """The adapter that a tensor belongs to, and its path without the adapter's name.

    Example:
        >>> split_adapter("layers.0.mlp.lora_A.mlp.weight"), split_adapter("base_model.iai.0.head.rate")
        (('mlp', 'layers.0.mlp.lora_A.weight'), ('0', 'base_model.iai.head.rate'))
    """
    parts = key.split(".")
    for place in range(1, len(parts)):
        container = parts[place - 1]
        of_core = parts[:place] in (["base_model", "iai"], ["iai"])
        if of_core or container.startswith("lora_") or container == "modules_to_save":
            return parts[place], ".".join(parts[:place] + parts[place + 1 :])
    return None, key


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter in a model, by their paths in it."""
    prefixes = tuners_utils._get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    return tuners_utils._filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)


def check_adapter_tensors(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that a file holds an adapter's tensors, all of them and no others, with finite values.

    Args:
        loaded: those of the file, by their paths in the model.
        expected: those of the model.

    Raises:
        ValueError: naming the first tensor that is missing, is too many, has another shape or is not finite.
    """
    advice = "it is damaged, or of another configuration or base; save or download the adapter again"
    if missing := sorted(expected.keys() - loaded.keys()):
        raise ValueError(f"the adapter's file lacks {len(missing)} tensors, such as {missing[0]!r}: {advice}")
    if extra := sorted(key for key in loaded.keys() - expected.keys() if adapter_of(key) or ".iai." in key):
        raise ValueError(f"the adapter's file has {len(extra)} tensors too many, such as {extra[0]!r}: {advice}")
    for key, tensor in expected.items():
        found = loaded[key]
        if found.shape != tensor.shape:
            shapes = f"{tuple(found.shape)}, expected {tuple(tensor.shape)}"
            raise ValueError(f"tensor {key!r} of the adapter's file has shape {shapes}: {advice}")
        if not found.isfinite().all():
            raise ValueError(f"tensor {key!r} of the adapter's file has values that are not finite: {advice}")
