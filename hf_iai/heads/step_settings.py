"""LearnedStepSettings: the hyperparameters of a learned optimizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from .classical import LOG_SCALE


@dataclass(frozen=True)
class LearnedStepSettings:
    """Hyperparameters of a `LearnedStep`, fixed at training time and saved with its weights.

    Args:
        momentum_decays: decays of the running averages of the gradient, at least one.
        second_decays: decays of the running averages of the squared gradient, at least one. The last one preconditions.
        factored_decay: decay of the row and column means of the squared gradient.
        times: the values of tau in the features tanh(t / tau - 1), in chunks read.
        hidden: h, width of the network.
        step_size: s at the start, the size of the network's part relative to the root mean square of theta.
        smallest_rms: used in place of theta's root mean square where that is smaller.
        most_log_magnitude: bound of a, the network's second output, up and down.
        largest_precondition: largest factor that preconditioning may apply to a coordinate, before the power p.
        largest_surprise: a gradient is clipped to this many times the mean length of the gradients before it.
        length_decay: decay of that mean length.
        doubt: number of standard errors from which a rising loss counts as certain, see `heads.guards`. A large number
            trusts all steps.
        log_scale: factor on the learned logarithms and powers.

    Raises:
        ValueError: if a value has the wrong type or is out of range.

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
        """Settings from the result of `to_dict`, also after a round trip through JSON. What is missing is the default.

        Raises:
            ValueError: for an unknown name, or as in the class.
        """
        known, values = [field.name for field in fields(cls)], values or {}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"learned_optimizer has the settings {known}, got {unknown}: leave them out")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_dict(self) -> dict:
        """The settings as JSON can store them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def decays(self) -> dict[str, float | tuple[float, ...]]:
        """The decay, or decays, of each running average by its name."""
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
