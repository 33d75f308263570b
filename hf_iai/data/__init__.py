"""Data: examples become chunks, or episodes and batches of episodes."""

from .chunks import batch_chunks, chunk_examples, chunk_text
from .collator import EpisodeCollator
from .episodes import check_disjoint, episodes_from_documents, episodes_from_labels
from .examples import Example, tokenize_example
from .labelled import LabelledEpisodeCollator, text_tokens
from .vectors import VectorEpisodeCollator, chunk_vectors

__all__ = [
    "EpisodeCollator",
    "Example",
    "LabelledEpisodeCollator",
    "VectorEpisodeCollator",
    "batch_chunks",
    "check_disjoint",
    "chunk_examples",
    "chunk_text",
    "chunk_vectors",
    "episodes_from_documents",
    "episodes_from_labels",
    "text_tokens",
    "tokenize_example",
]
