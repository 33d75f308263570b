"""State types: what the state theta is, and how the base reads it."""

from .hypernetwork import HypernetworkState
from .linear import LinearState
from .lora import LoraState
from .mlp import MLPState
from .prefix import PrefixState
from .prefix_lora import PrefixLoraState
from .prompt import PromptState
from .slots import SlotState
from .token_slots import TokenSlots

__all__ = [
    "HypernetworkState",
    "LinearState",
    "LoraState",
    "MLPState",
    "PrefixLoraState",
    "PrefixState",
    "PromptState",
    "SlotState",
    "TokenSlots",
]
