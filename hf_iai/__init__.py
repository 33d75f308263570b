"""Iterative amortized inference for Hugging Face models; importing registers the method "IAI" with PEFT."""

from .config import IAIConfig
from .data import (
    EpisodeCollator,
    batch_chunks,
    chunk_examples,
    chunk_text,
    episodes_from_documents,
    episodes_from_labels,
)
from .embedded import embedded_base
from .evaluation import evaluate_curve
from .model import IAIModel
from .registration import register
from .state import TaskState
from .trainer import IAITrainer
from .training_args import IAITrainingArguments

register(IAIConfig, IAIModel)

__version__ = "0.1.0"
__all__ = [
    "EpisodeCollator",
    "IAIConfig",
    "IAIModel",
    "IAITrainer",
    "IAITrainingArguments",
    "TaskState",
    "batch_chunks",
    "chunk_examples",
    "chunk_text",
    "embedded_base",
    "episodes_from_documents",
    "episodes_from_labels",
    "evaluate_curve",
]
