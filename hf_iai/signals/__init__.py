"""What a chunk says about the state."""

from .observations import read_observations

__all__ = ["read_observations"]
