"""What a chunk says about the state."""

from .observations import Reading, read_observations
from .pooling import Pooled, TokenPooling

__all__ = ["Pooled", "Reading", "TokenPooling", "read_observations"]
