"""What a chunk says about the state."""

from .observations import Reading, read_observations
from .pooling import TokenPooling

__all__ = ["Reading", "TokenPooling", "read_observations"]
