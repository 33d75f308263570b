"""A signal: what a chunk says about a state. The core of each signal registers itself with what follows here."""

from ..bases.base import Base
from ..config import IAIConfig
from ..registry import HEADS
from .core import Core, StateCore


class SignalCore(StateCore):
    """A core that is registered as a signal of `IAIConfig`.

    Attributes:
        default_head: of the heads that take this signal.
        in_words: a sentence for model cards.
    """

    fields = frozenset({"head"})
    default_head: str
    in_words: str

    @classmethod
    def make(cls, base: Base, config: IAIConfig) -> Core:
        """The core of an adapter that reads texts."""
        return cls(base, config)

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        """Whether the base, with LoRA, reads chunks out."""
        return True

    @classmethod
    def complete(cls, config: IAIConfig) -> None:
        """Fill in the head.

        Raises:
            ValueError: for a head of another signal.
        """
        heads = [name for name, head in HEADS.items() if config.signal in head.signals]
        heads.sort(key=lambda name: name != cls.default_head)
        config.head = cls.default_head if config.head is None else config.head
        if config.head not in heads:
            raise ValueError(f"signal={config.signal!r} has the heads {heads}, got head={config.head!r}")
