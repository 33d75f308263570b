"""LoRA fine-tuning of the encoder on all labelled texts read so far: a baseline with a training run for each task."""

import copy
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ..export.peft import unwrapped

RANK, RATE, BATCH, STEPS = 8, 1e-3, 16, 100


def lora_fine_tuning(
    model, support: dict[str, Tensor], labels: Tensor, query: dict[str, Tensor], *, seed: int = 0
) -> tuple[Tensor, float]:
    """Train the encoder and its own classifier with LoRA of rank 8, by 100 steps of AdamW, and answer the queries.

    Args:
        model: an adapted model with a linear state. A copy of its bare encoder is trained; the model does not change.
        support: `input_ids` and `attention_mask` of the examples, (S, T).
        labels: class numbers of the examples, (S,), from 0.
        query: `input_ids` and `attention_mask` of the queries, (Q, T').
        seed: seed of the new head, LoRA and batches.

    Returns:
        The class of each query (Q,), and the seconds that training and answering took.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        tuned = get_peft_model(_classifier(model, int(labels.max()) + 1), LoraConfig(task_type="SEQ_CLS", r=RANK))
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], RATE)
        for _ in range(STEPS):
            rows = torch.randint(len(labels), (BATCH,))
            loss = tuned(**{name: t[rows] for name, t in support.items()}, labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        answers = tuned.eval()(**query).logits.argmax(-1)
    return answers, time.perf_counter() - started


def _classifier(model, num_classes: int) -> PreTrainedModel:
    """The bare encoder with a new head, in training mode."""
    base = unwrapped(model.base_model, merged=False)
    settings = copy.deepcopy(base.config)
    settings.num_labels, settings.problem_type = num_classes, "single_label_classification"
    fresh = type(base)(settings)
    encoder = f"{base.base_model_prefix}."
    weights = {name: tensor for name, tensor in base.state_dict().items() if name.startswith(encoder)}
    fresh.load_state_dict(weights, strict=False)
    return fresh.train()
