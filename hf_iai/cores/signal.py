"""SignalCore: base class of the cores that are registered as a signal."""

from ..bases.base import Base
from ..config import IAIConfig
from ..registry import HEADS, Part
from .core import Core, StateCore


class SignalCore(StateCore, Part):
    """A core that is registered under a value of `IAIConfig.signal`.

    Attributes:
        default_head: the head that is used if the configuration names none.
        in_words: a sentence for model cards.
    """

    fields = frozenset({"head"})
    default_head: str
    in_words: str

    @classmethod
    def make(cls, base: Base, config: IAIConfig) -> Core:
        """Make the core of an adapter that reads texts."""
        return cls(base, config)

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        """Whether the base, with LoRA, reads chunks out into slots."""
        return True

    @classmethod
    def complete(cls, config: IAIConfig) -> None:
        """Fill in the head.

        Raises:
            ValueError: if the head does not belong to this signal.
        """
        heads = [name for name, head in HEADS.items() if head.fits(config)]
        heads.sort(key=lambda name: name != cls.default_head)
        config.head = cls.default_head if config.head is None else config.head
        if not heads:
            raise ValueError(f"state_type={config.state_type!r} needs signal='both', got {config.signal!r}")
        if config.head not in heads:
            raise ValueError(f"signal={config.signal!r} has the heads {heads}, got head={config.head!r}")
