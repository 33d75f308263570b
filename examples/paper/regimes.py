"""States of linear regression that a small transformer reads examples into: its prefix, or the weights of an MLP.

Tasks, base and training are those of `in_context`, whose table has the regime implicit.

    explicit                   theta is a prefix of 8 slots; base and LoRA answer, and a learned map decodes
    parametric, read           theta is the weights of an MLP with 16 hidden units, which the base writes
    parametric, gradients      the same weights, updated with the gradient of each chunk's loss, by Meta-SGD or a
                               learned optimizer

A state has the same size after 5000 examples as after 10, and reads 16 examples at a time.
"""

from functools import partial

import torch
from peft import get_peft_model
from torch import Tensor, nn

from hf_iai import IAIConfig
from hf_iai.objectives import Objective

from . import in_context
from .in_context import WIDTH, Models, Tasks, small_base

VALUE, SCALE, COUNTED = in_context.VALUE, in_context.SCALE, in_context.COUNTED


class State(nn.Module):
    """A state of hf_iai on the small transformer."""

    def __init__(self, d: int, reads: bool = True, **config) -> None:
        super().__init__()
        if reads:
            config |= {"r": WIDTH, "lora_alpha": WIDTH, "target_modules": "all-linear"}
        config |= {"task_type": "CAUSAL_LM", "vector_width": d, "num_outputs": 1, "likelihood": "gaussian"}
        self.model = get_peft_model(small_base(), IAIConfig(**config))
        self.model.base_model.objective = Objective(scored_states="doubling")

    def loss(self, tasks: Tasks, size: int) -> Tensor:
        """Loss of the queries before any chunk and after the last 1, 2, 4, ... chunks of `size` examples."""
        x, y, queries, targets = tasks
        chunks, values = (torch.stack(t.split(size, 1), 1) for t in (x, y.unsqueeze(-1)))
        episode = {"chunk_inputs_embeds": chunks, "chunk_labels": values}
        return self.model(**episode, inputs_embeds=queries, labels=targets.unsqueeze(-1)).loss

    def forward(self, tasks: Tasks, size: int) -> Tensor:  # (B, Q)
        x, y, queries, _ = tasks
        chunks = zip(x.split(size, 1), y.unsqueeze(-1).split(size, 1), strict=True)
        state = self.model.adapt({"inputs_embeds": c, "labels": v} for c, v in chunks)
        return self.model(inputs_embeds=queries.flatten(0, 1), task_state=state).logits.view(queries.shape[:2])


MLP = {"state_type": "mlp", "num_state_tokens": 16}
GRADIENTS = MLP | {"signal": "gradients", "reads": False}
MODELS: Models = {
    "explicit": partial(State, regime="explicit", state_type="prefix", num_state_tokens=8),
    "parametric, read": partial(State, **MLP),
    "parametric, Meta-SGD": partial(State, head="meta_sgd", **GRADIENTS),
    "parametric, learned optimizer": partial(State, head="learned_optimizer", **GRADIENTS),
}
table = partial(in_context.table, models=MODELS)
