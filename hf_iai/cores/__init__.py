"""Cores: what an adapter learns besides LoRA, and how it updates a state."""

from .average import AverageCore
from .both import BothCore
from .core import Core, EpisodeBatch, State, StateCore
from .gaussian import GaussianCore
from .gradient import GradientCore
from .implicit import ImplicitCore
from .implicit_vectors import ImplicitVectorCore
from .linear import LinearCore
from .memory import MemoryCore
from .recent import RecentCore
from .tokens import TokensCore
from .vectors import ExplicitVectorCore, MLPCore, MLPGradientCore

__all__ = [
    "AverageCore",
    "BothCore",
    "Core",
    "EpisodeBatch",
    "ExplicitVectorCore",
    "GaussianCore",
    "GradientCore",
    "ImplicitCore",
    "ImplicitVectorCore",
    "LinearCore",
    "MLPCore",
    "MLPGradientCore",
    "MemoryCore",
    "RecentCore",
    "State",
    "StateCore",
    "TokensCore",
]
