"""Signals: what a chunk says about the state, as read-outs (observations) or as gradients of its loss."""

from .gradients import gradients_of, read_gradients
from .observations import Reading, read_observations
from .pooling import Pooled, TokenPooling

__all__ = ["Pooled", "Reading", "TokenPooling", "gradients_of", "read_gradients", "read_observations"]
