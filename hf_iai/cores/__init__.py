"""What an adapter learns besides LoRA, and how it refines a state: one core for each signal and accumulation."""

from ..bases.base import Base
from ..config import IAIConfig
from .average import AverageCore
from .both import BothCore
from .core import Core
from .gaussian import GaussianCore
from .gradient import GradientCore
from .implicit import ImplicitCore
from .implicit_vectors import ImplicitVectorCore
from .linear import LinearCore
from .recent import RecentCore
from .vectors import ExplicitVectorCore, MLPCore, MLPGradientCore

__all__ = [
    "AverageCore",
    "BothCore",
    "Core",
    "ExplicitVectorCore",
    "GaussianCore",
    "GradientCore",
    "ImplicitCore",
    "ImplicitVectorCore",
    "LinearCore",
    "MLPCore",
    "MLPGradientCore",
    "RecentCore",
    "make_core",
]


def make_core(base: Base, config: IAIConfig) -> Core | ImplicitCore:
    """The core that the configuration asks for, on the base's device."""
    if config.regime == "implicit":
        core = ImplicitCore if config.vector_width is None else ImplicitVectorCore
    elif config.state_type == "linear":
        core = {"softmax": LinearCore, "gaussian": GaussianCore}[config.likelihood]
    elif config.state_type == "mlp":
        core = {"observations": MLPCore, "gradients": MLPGradientCore}[config.signal]
    elif config.vector_width is not None:
        core = ExplicitVectorCore
    elif config.signal == "observations":
        core = {"average": AverageCore, "recent": RecentCore}[config.accumulation]
    else:
        core = {"gradients": GradientCore, "both": BothCore}[config.signal]
    return core(base, config).to(base.model.get_input_embeddings().weight.device)
