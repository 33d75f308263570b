"""The kinds of task: what chunks and queries are, what is learned, and how it is measured."""

from .classification import Classification
from .inputs import Inputs
from .refined_text import RefinedText
from .refined_vectors import RefinedVectors
from .regression import Regression
from .task import Task, task_of
from .text import Text
from .vectors import Vectors

__all__ = [
    "Classification",
    "Inputs",
    "RefinedText",
    "RefinedVectors",
    "Regression",
    "Task",
    "Text",
    "Vectors",
    "task_of",
]
