"""Low-rank updates of the base's weights, a different one for each task of a batch.

Axes: N tasks, r rank, I and O input and output width of a module.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

Updates = Mapping[nn.Module, tuple[Tensor, Tensor]]  # module -> A (N, r, I) and B (N, O, r); N = 1: all tasks share it

_active: ContextVar[Updates] = ContextVar("low_rank_updates", default={})  # noqa: B039, the default is never changed
_hooking = Lock()
_hooks: dict[nn.Module, tuple[int, RemovableHandle]] = {}  # how many contexts use the hook of a module, and the hook


def active_updates() -> Updates:
    """The updates of the current context."""
    return _active.get()


@contextmanager
def low_rank_updates(updates: Updates) -> Iterator[None]:
    """A context in which the given modules compute `W x + B A x`, and no other modules have an update.

    The rows of a batch form N groups of consecutive rows. Group i uses A[i] and B[i]. The context may be entered again,
    inside itself or later, as gradient checkpointing does when it recomputes a layer.

    Args:
        updates: module -> A (N, r, I) and B (N, O, r); with N = 1 it serves all rows.
    """
    token = _active.set(updates)
    _hook(updates)
    try:
        yield
    finally:
        _unhook(updates)
        _active.reset(token)


def _hook(modules: Iterable[nn.Module]) -> None:
    """Let modules look for their update. Threads share a hook, which does nothing without an update of their own."""
    with _hooking:
        for module in modules:
            count, hook = _hooks.get(module, (0, None))
            _hooks[module] = count + 1, hook or module.register_forward_hook(_add_update)


def _unhook(modules: Iterable[nn.Module]) -> None:
    """The last one of all threads takes the hooks away."""
    with _hooking:
        for module in modules:
            count, hook = _hooks.pop(module)
            if count > 1:
                _hooks[module] = count - 1, hook
            else:
                hook.remove()


def _add_update(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if module not in (updates := _active.get()):
        return output
    down, up = (weight.to(inputs[0].dtype) for weight in updates[module])
    tokens = _of_each_task(inputs[0], down)
    if len(up) == 1 and tokens.dtype == output.dtype:  # product and sum in one call
        return torch.addmm(output.flatten(0, -2), tokens.flatten(0, -2), up[0].mT).view(output.shape)
    return output + _of_each_task(tokens, up).to(output.dtype)


def _of_each_task(tokens: Tensor, weight: Tensor) -> Tensor:  # (..., I), (N, O, I) -> (..., O)
    """Each task's tokens times its own weight. They come as (rows, T, I) or, in some families, as (rows * T, I)."""
    if len(weight) == 1:
        return nn.functional.linear(tokens, weight[0])
    grouped = tokens.reshape(len(weight), -1, tokens.shape[-1])  # a task's rows are consecutive
    return (grouped @ weight.mT).view(*tokens.shape[:-1], -1)


def linear_modules(
    model: nn.Module, target_modules: str | list[str], uncalled: Collection[str] = ()
) -> dict[str, tuple[int, int]]:
    """Find the linear modules that `target_modules` names, with or without LoRA.

    Args:
        model: the base.
        target_modules: as in PEFT: `"all-linear"` (without output embeddings and experts), a list of ends of names, or
            a regular expression for whole paths.
        uncalled: ends of the names of modules whose weights are used without calling the module.

    Returns:
        Path of each module -> (input width, output width).

    Raises:
        ValueError: if no module is found, or one is not linear, is never called, or is an expert. Experts see the
            tokens of all tasks mixed together.
    """
    modules = {name: m for name, m in model.named_modules() if not re.search(r"(^|\.)(base_layer$|lora_)", name)}
    if target_modules == "all-linear":
        found = [n for n, m in modules.items() if _shape(m) and m is not model.get_output_embeddings()]
        found = [n for n in found if "experts" not in n.split(".") and not _is_meant(n, uncalled)]
    else:
        found = [name for name in modules if _is_meant(name, target_modules)]
    if not found:
        raise ValueError(
            f"state_target_modules={target_modules!r} names no module of the base: see its named_modules()"
        )
    for name in found:
        if _shape(modules[name]) is None:
            kind = type(modules[name]).__name__
            raise ValueError(f"state_target_modules names {name!r}, a {kind}: name nn.Linear or Conv1D modules")
        if "experts" in name.split("."):
            raise ValueError(f"state_target_modules names {name!r}, an expert, which mixes the tasks: leave it out")
        if _is_meant(name, uncalled):
            raise ValueError(f"state_target_modules names {name!r}, whose weight is read without a call: leave it out")
    return {name: _shape(modules[name]) for name in found}


def _is_meant(name: str, targets: str | Collection[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(layer, Conv1D):
        return tuple(layer.weight.shape)
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None
