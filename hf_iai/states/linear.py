"""What a linear model is computed from. This state works on features, after the encoder, not before the text."""

from torch import nn

from ..bases.base import FEATURES
from ..bases.encoder import Encoder
from ..config import IAIConfig
from ..registry import STATES
from .slots import SlotState


@STATES.register("linear")
class LinearState(SlotState):
    """State tensors from which `heads.ClassRows` and `heads.GaussianRows` compute the rows of a linear model.

    A classifier with C classes keeps, in float32:

        count (B, C)                     number of examples of each class
        total (B, C, d)                  sum of their features
        moment (B, d, d)                 sum of x x' over all examples
        prototype (B, C, 32, d)          weighted points that stand for the examples of a class
        mass (B, C, 32)                  their weights
        fitted (B, C, d + 1)             what a fit to the prototypes adds to rows and biases
        guessed (B, 5)                   how well late chunks were guessed before they were read

    A regression with o outputs keeps, in float64:

        count (B,), total (B, d), moment (B, d, d)       n, sum of x, sum of x x'
        target, square (B, o), cross (B, o, d)           sum of y, of y^2, of y x'

    theta(0) is not learned: all tensors are 0, and nothing was read.

    Args:
        width: d, width of the features.
    """

    needs = FEATURES

    @classmethod
    def make(cls, base: Encoder, config: IAIConfig, *, reads: bool) -> "LinearState":
        return cls(base.width)

    @classmethod
    def default_regime(cls) -> str:
        return "parametric"

    @classmethod
    def size(cls, config: IAIConfig) -> str:
        return config.pooling

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.start = nn.ParameterDict()
