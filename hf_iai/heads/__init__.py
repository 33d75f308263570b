"""How evidence becomes the next state."""

from .average import RunningAverage
from .correction import Correction
from .recent import push_tokens

__all__ = ["Correction", "RunningAverage", "push_tokens"]
