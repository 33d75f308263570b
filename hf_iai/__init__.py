"""Iterative amortized inference for Hugging Face models; importing registers the method "IAI" with PEFT."""

from .compat import allow_no_layers, carry_cards
from .config import IAIConfig
from .data import (
    EpisodeCollator,
    LabelledEpisodeCollator,
    VectorEpisodeCollator,
    batch_chunks,
    chunk_examples,
    chunk_text,
    chunk_vectors,
    episodes_from_documents,
    episodes_from_labels,
)
from .embedded import embedded_base
from .evaluation import evaluate_curve
from .export import export_to_peft
from .export_classifier import export_classifier
from .hub import update_card
from .learned_optimizer import LearnedOptimizer
from .model import IAIModel
from .registration import IAIType, register
from .state import TaskState
from .trainer import IAITrainer
from .training_args import IAITrainingArguments
from .vector_base import vector_base

register(IAIConfig, IAIModel)
carry_cards(IAIType.IAI, update_card)
allow_no_layers(IAIType.IAI)

__version__ = "0.1.0"
__all__ = [
    "EpisodeCollator",
    "IAIConfig",
    "IAIModel",
    "IAITrainer",
    "IAITrainingArguments",
    "LabelledEpisodeCollator",
    "LearnedOptimizer",
    "TaskState",
    "VectorEpisodeCollator",
    "batch_chunks",
    "chunk_examples",
    "chunk_text",
    "chunk_vectors",
    "embedded_base",
    "episodes_from_documents",
    "episodes_from_labels",
    "evaluate_curve",
    "export_classifier",
    "export_to_peft",
    "vector_base",
]
