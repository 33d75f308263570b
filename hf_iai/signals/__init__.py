"""What a chunk says about the state."""

from .gradients import read_gradients
from .observations import Reading, read_observations
from .pooling import Pooled, TokenPooling

__all__ = ["Pooled", "Reading", "TokenPooling", "read_gradients", "read_observations"]
