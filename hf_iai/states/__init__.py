"""What theta is, and how the base reads it."""

from .prefix import PrefixState
from .prompt import PromptState

STATE_TYPES = {"prefix": PrefixState, "prompt": PromptState}

__all__ = ["STATE_TYPES", "PrefixState", "PromptState"]
