"""How passes run: with or without LoRA, differentiated twice, under FSDP, under gradient checkpointing."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..low_rank import active_updates, low_rank_updates


class _Switches(threading.local):
    """LoRA layer -> whether it is on, in this thread. torch.compile follows it, as it does no context variable."""

    layers: Mapping[nn.Module, bool] = {}  # noqa: RUF012, never changed


_switches = _Switches()


@contextmanager
def lora_enabled(modules: list[LoraLayer], enabled: bool) -> Iterator[None]:
    """A context in which LoRA is on or off, in this thread only.

    PEFT's own switch is a flag of each layer. All threads share it, and it would also change `requires_grad`.

    Args:
        modules: the LoRA layers.
        enabled: whether they apply LoRA inside the context.
    """
    before = _switches.layers
    _switches.layers = {**before, **dict.fromkeys(modules, enabled)}
    try:
        yield
    finally:
        _switches.layers = before


def _is_disabled(layer: LoraLayer) -> bool:
    enabled = _switches.layers.get(layer)
    return layer._disable_adapters if enabled is None else not enabled


LoraLayer.disable_adapters = property(_is_disabled)  # what every forward pass of PEFT asks


_in_math_attention: ContextVar[bool] = ContextVar("math_attention", default=False)


@contextmanager
def math_attention(enabled: bool) -> Iterator[None]:
    """A context in which attention uses plain operations, because fused kernels cannot be differentiated twice."""
    token = _in_math_attention.set(enabled)
    with ExitStack() as stack:
        if enabled:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            yield
        finally:
            _in_math_attention.reset(token)


def check_double_backward(model: nn.Module) -> None:
    """Refuse models whose gradients cannot be differentiated again.

    Raises:
        ValueError: if attention is neither `"eager"` nor `"sdpa"`, or FSDP shards the model.
    """
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa", None):
        raise ValueError(
            f"second_order=True differentiates attention twice, which {attention!r} cannot: load the base with "
            "attn_implementation='sdpa', or set second_order=False"
        )
    check_unsharded(model, "second_order=True")


def check_unsharded(model: nn.Module, setting: str) -> None:
    """Refuse models that FSDP shards, for a setting that takes gradients with respect to whole weights.

    Raises:
        ValueError: if the model is sharded.
    """
    if _sharding(model):
        raise ValueError(f"{setting} cannot be sharded by FSDP: train with DDP, or choose another setting")


@contextmanager
def inner_backward(model: nn.Module) -> Iterator[None]:
    """A context for a backward pass inside the forward pass: FSDP reduces no gradients and frees no weights in it."""
    if not (shards := _sharding(model)):
        yield
        return
    context = shards[0]._get_fsdp_state()._state_ctx  # shared by all sharded modules, also those around the base
    groups = [group for state in context.all_states for group in state._fsdp_param_groups]
    names = ("reshard_after_backward", "reduce_grads", "all_reduce_grads")
    before = [[getattr(group, name) for name in names] for group in groups]
    last, context.is_last_backward = context.is_last_backward, False
    for group in groups:
        for name in names:
            setattr(group, name, False)
    try:
        yield
    finally:
        context.is_last_backward = last
        for group, values in zip(groups, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(group, name, value)


def most_on_all_ranks(model: nn.Module, number: int) -> int:
    """The largest of a number that each process has, if FSDP shards the model; else the number itself.

    Sharded weights are gathered in every pass, so all processes have to make the same number of passes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    if not any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules()):
        return number
    most = torch.tensor([number], device=model.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _sharding(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP shards.

    Raises:
        ValueError: for FSDP version 1, which has no such switches.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("gradients cannot be taken within FSDP version 1: set fsdp_version to 2, or train with DDP")
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def prepare_checkpointing(model: nn.Module) -> None:
    """Make gradient checkpointing keep our cache, and recompute each layer in the contexts of its forward pass.

    Raises:
        ValueError: for reentrant checkpointing, which would cut the gradient of the read-outs.
    """
    for layer in model.modules():
        if not getattr(layer, "gradient_checkpointing", False):
            continue
        if not isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False  # a stack, as GPT-2's, would drop the cache; its layers keep theirs
            continue
        layer._can_checkpoint_with_cache = True
        function = layer._gradient_checkpointing_func
        if not isinstance(function, _CheckpointAsNow):
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise ValueError("gradient checkpointing with use_reentrant=True: pass use_reentrant=False")
            layer._gradient_checkpointing_func = _CheckpointAsNow(function, layer)


class _CheckpointAsNow:
    """Recomputes a layer in the contexts of its forward pass, since the backward pass runs outside of them.

    Args:
        checkpoint: the checkpointing function to call.
        layer: the layer that is checkpointed.
    """

    def __init__(self, checkpoint: Callable, layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.lora = [module for module in layer.modules() if isinstance(module, LoraLayer)]

    def __call__(self, forward: Callable, *args):
        enabled = bool(self.lora) and not self.lora[0].disable_adapters
        updates, in_math = active_updates(), _in_math_attention.get()

        def forward_as_now(*args):
            with lora_enabled(self.lora, enabled), low_rank_updates(updates), math_attention(in_math):
                return forward(*args)

        return self.checkpoint(forward_as_now, *args)
