"""Export of a lora state as plain LoRA weights.

Axes: B tasks, r rank, I and O input and output width of a module.
"""

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model import IAIModel
from ..state import TaskState

Pair = tuple[Tensor, Tensor]  # A (r, I), B (O, r)


@torch.no_grad()
def lora_adapters(tuner: IAIModel, state: TaskState) -> list[tuple[LoraConfig, dict[str, Tensor]]]:
    """PEFT's configuration and the LoRA weights of each task.

    In regime explicit the predictor's LoRA and the task's update are joined, with their ranks side by side:

        B A = [scale B_predictor, B_task] [A_predictor; A_task]

    The scales are part of the weights, so the `alpha` of each module is its rank.

    Raises:
        ValueError: if the predictor has LoRA on modules that are not linear.
    """
    state, reader = tuner.checked_state(state), tuner.reader
    with reader.frozen():
        updates = reader.core.state.update(reader.core.corrected(reader.base, state))
    predictor = _predictor(tuner) if tuner.task.config.lora_answers else {}
    tasks = []
    for task in range(state.batch_size):
        # One `down` may serve all tasks.
        own = {path: (down.expand(len(up), -1, -1)[task], up[task]) for path, (down, up) in updates.items()}
        paths = [*predictor, *(path for path in own if path not in predictor)]
        tasks.append({path: _side_by_side([p[path] for p in (predictor, own) if path in p]) for path in paths})
    return [(_config(tuner, pairs), _weights(pairs)) for pairs in tasks]


def _predictor(tuner: IAIModel) -> dict[str, Pair]:
    name, found = tuner.active_adapters[0], {}
    for path, layer in tuner.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D) or name not in layer.lora_A:
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(
                f"the predictor has LoRA on {path!r}, a {kind}, which cannot be joined "
                "with a lora state: train an adapter whose target_modules are linear"
            )
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        found[path] = down, layer.scaling[name] * up
    return found


def _side_by_side(pairs: list[Pair]) -> Pair:
    downs, ups = zip(*pairs, strict=True)
    return torch.cat([t.float() for t in downs]), torch.cat([t.float() for t in ups], 1)


def _config(tuner: IAIModel, pairs: dict[str, Pair]) -> LoraConfig:
    ranks = {path: len(down) for path, (down, _) in pairs.items()}
    most = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != most}
    layers = (tuner.model.get_submodule(path) for path in ranks)
    layers = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers]
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
    )


def _weights(pairs: dict[str, Pair]) -> dict[str, Tensor]:
    return {
        f"base_model.model.{path}.lora_{name}.weight": tensor.cpu().contiguous()
        for path, pair in pairs.items()
        for name, tensor in zip("AB", pair, strict=True)
    }
