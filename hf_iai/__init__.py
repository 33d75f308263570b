"""Iterative amortized inference for Hugging Face models; importing registers the method "IAI" with PEFT."""

from .bases.compat import allow_no_layers, carry_cards, tell_adapters_by_place
from .bases.registration import IAIType, register
from .bases.vector_base import vector_base
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
from .export.classifier import export_classifier
from .export.peft import export_to_peft
from .hub.cards import update_card
from .model import IAIModel
from .optim import LearnedOptimizer
from .state import TaskState
from .trainer import IAITrainer
from .training_args import IAITrainingArguments

register(IAIConfig, IAIModel)
carry_cards(IAIType.IAI, update_card)
allow_no_layers(IAIType.IAI)
tell_adapters_by_place()

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
