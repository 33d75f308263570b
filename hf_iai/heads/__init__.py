"""How evidence becomes the next state."""

from .average import RunningAverage
from .correction import Correction
from .delta import WRITES, DeltaRule
from .kept import KEPT, NEVER, followed_by, keep_tokens, trace
from .recent import push_tokens

__all__ = [
    "KEPT",
    "NEVER",
    "WRITES",
    "Correction",
    "DeltaRule",
    "RunningAverage",
    "followed_by",
    "keep_tokens",
    "push_tokens",
    "trace",
]
