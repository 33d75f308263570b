"""LearnedStepSettings: the constants that a learned step was trained with."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from .classical import LOG_SCALE


@dataclass(frozen=True)
class LearnedStepSettings:
    """What the weights of a `LearnedStep` mean nothing without; it is saved beside them.

    Args:
        momentum_decays, second_decays: of the averages of the gradient and of its square; at least one each. The last
            of the second moments preconditions.
        factored_decay: of the row and column means of the squared gradient.
        times: tau, in chunks read, of the features tanh(t / tau - 1).
        hidden: h, the width of the network.
        step_size: of the network's part, in units of theta's rms.
        smallest_rms: that unit, where theta is smaller.
        most_log_magnitude: of the network's second output.
        largest_precondition: the most that preconditioning makes of a coordinate, before the power.
        largest_surprise, length_decay: a gradient is clipped to so many times the mean length of those before, and the
            decay of that mean.
        doubt: how many standard errors make a rising loss certain, see `heads.guards`; a large number trusts all steps.
        log_scale: what learned logarithms and powers are multiplied with.

    Raises:
        ValueError: for a value that is not of its kind.

    Example:
        >>> from hf_iai.heads import LearnedStepSettings
        >>> LearnedStepSettings.from_dict({"hidden": 16}).to_dict()["momentum_decays"]
        [0.5, 0.9, 0.99]
    """

    momentum_decays: tuple[float, ...] = (0.5, 0.9, 0.99)
    second_decays: tuple[float, ...] = (0.9, 0.999)
    factored_decay: float = 0.999
    times: tuple[float, ...] = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)
    hidden: int = 32
    step_size: float = 0.01
    smallest_rms: float = 0.1
    most_log_magnitude: float = 3.0
    largest_precondition: float = 1e3
    largest_surprise: float = 2.5
    length_decay: float = 0.99
    doubt: float = 1.5
    log_scale: float = LOG_SCALE

    def __post_init__(self) -> None:
        _check(self, ("momentum_decays", "second_decays"), "at least one decay from 0 to below 1", _are_decays)
        for decay in ("factored_decay", "length_decay"):
            _check(self, (decay,), "a decay from 0 to below 1", _is_decay)
        _check(self, ("times",), "at least one number above 0", lambda v: _is_sequence(v) and all(map(_is_positive, v)))
        _check(self, ("hidden",), "a whole number of at least 1", lambda v: type(v) is int and v >= 1)
        positive = ("step_size", "smallest_rms", "most_log_magnitude", "largest_precondition", "largest_surprise")
        positive = (*positive, "doubt", "log_scale")
        _check(self, positive, "a number above 0", _is_positive)

    @classmethod
    def from_dict(cls, values: Mapping | None) -> "LearnedStepSettings":
        """Of what `to_dict` returned, as JSON keeps it, or of a part of it: the rest are the defaults."""
        known, values = [field.name for field in fields(cls)], values or {}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"learned_optimizer has the settings {known}, got {unknown}: leave them out")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_dict(self) -> dict:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def decays(self) -> dict[str, float | tuple[float, ...]]:
        """Of each average, by its name."""
        factored = {"row": self.factored_decay, "column": self.factored_decay}
        return {"momentum": self.momentum_decays, "second": self.second_decays} | factored


def _check(settings: LearnedStepSettings, names: tuple[str, ...], expected: str, fits) -> None:
    for name in names:
        if not fits(value := getattr(settings, name)):
            raise ValueError(
                f"learned_optimizer's {name} must be {expected}, got {value!r}: leave it out for the default, "
                f"{getattr(LearnedStepSettings, name)}"
            )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0


def _is_decay(value) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_sequence(value) -> bool:
    return isinstance(value, tuple) and len(value) > 0


def _are_decays(value) -> bool:
    return _is_sequence(value) and all(map(_is_decay, value))
