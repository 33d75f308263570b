"""Task: one kind of task. It says what is read and answered, what is learned, and how the result is measured.

`hf_iai.registry.kind_of` finds the kind of a configuration. Only this folder asks which kind it is.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..bases.base import Base
from ..config import IAIConfig
from ..cores import Core
from ..data import EpisodeCollator
from ..registry import HEADS, SIGNALS, STATES, Part, kind_of
from ..tensors import NO_LOSS
from .inputs import Inputs


class Task(Part):
    """One kind of task, for one configuration.

    To add a kind, write a subclass and register it with `@TASKS.register("name")`.

    Attributes:
        asked_for_by: how a configuration asks for this kind, in error messages.
        likelihoods, task_type: the values of these fields of `IAIConfig` that this kind accepts.
        metric: the metric of its curve: `"loss"`, `"accuracy"` or `"squared_error"`.
        unit: the unit of its training loss.
        pipeline_tag: its task on the Hub.
        exports: what a state can be exported to: `"peft"`, `"classifier"`.
        auto_class: the class of transformers that loads a base.
        makes_states: whether chunks are read into a task state (`adapt`). If not, they refine predictions (`refine`).
        reads_vectors: whether examples and queries are vectors, which need no tokenizer.
        has_teacher: whether the bare base can be the teacher of `kl_weight`.
        learns_start: whether theta(0) is learned, so that it can have a learning rate of its own.
        refuses: what cannot work for this kind, with the reason; see `check_can`.
        card_intro, card_example: text and code for model cards, with places such as `{model_id}` to fill in.
    """

    asked_for_by: str
    likelihoods: tuple[str, ...] = ("softmax",)
    task_type = "CAUSAL_LM"
    metric, unit, pipeline_tag = "loss", "nats per token", "text-generation"
    exports: frozenset[str] = frozenset()
    auto_class: Any = AutoModelForCausalLM
    makes_states, reads_vectors, has_teacher, learns_start = True, False, True, True
    refuses: dict[str, str] = {
        "refine": "refine needs regime='implicit', where the state is the query's own prediction, got "
        "{config.regime!r}: use adapt, and answer under its state"
    }
    card_intro = (
        "the base reads a task chunk by chunk, carries what it learned in a small task state, and answers under it."
    )
    card_example = ""

    def __init__(self, config: IAIConfig) -> None:
        self.config = config

    # ---------------------------------------------------------------- the configuration

    @classmethod
    @abstractmethod
    def matches(cls, config: IAIConfig) -> bool:
        """Whether a configuration describes this kind of task."""

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        if (config.state_type == "linear") != (config.task_type == "SEQ_CLS"):
            raise ValueError(
                f"state_type='linear' and task_type='SEQ_CLS' need each other, got state_type={config.state_type!r} "
                f"and task_type={getattr(config.task_type, 'value', config.task_type)!r}: set both, or neither"
            )

    @classmethod
    def default_regime(cls, config: IAIConfig) -> str:
        return STATES[config.state_type].default_regime()

    @classmethod
    def complete(cls, config: IAIConfig) -> None:
        """Fill in the fields that follow from others."""
        SIGNALS[config.signal].complete(config)

    @classmethod
    def parts(cls, config: IAIConfig) -> list[type[Part]]:
        """This kind, and then all other parts that the configuration has chosen, in the order of their checks."""
        return [cls, SIGNALS[config.signal], HEADS[config.head], STATES[config.state_type]]

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        """Whether the base, with LoRA, reads chunks out into slots."""
        return SIGNALS[config.signal].reads_out(config)

    @classmethod
    def called(cls, config: IAIConfig) -> str:
        """The choices of the configuration, for error messages."""
        return f"state_type={config.state_type!r}, signal={config.signal!r}, head={config.head!r}"

    # ---------------------------------------------------------------- the model

    def check_base(self, base: Base) -> None:
        """Refuse a base that cannot do this kind of task.

        Raises:
            ValueError: if the base cannot do it.
        """
        base.check_offers(STATES[self.config.state_type].needs, f"state_type={self.config.state_type!r}")

    @abstractmethod
    def core(self, base: Base) -> Core:
        """Make the core: what is learned besides LoRA."""

    @abstractmethod
    def inputs(self, base: Base, core: Core) -> Inputs:
        """Make the object that checks chunks and queries and brings them into shape."""

    def check_can(self, method: str) -> None:
        """Refuse a method of the model that cannot work for this kind of task.

        Raises:
            ValueError: if it cannot work.
        """
        if method in self.refuses:
            raise ValueError(self.refuses[method].format(method=method, config=self.config))

    # ---------------------------------------------------------------- training

    def collator(self, tokenizer: PreTrainedTokenizerBase | None, chunk_size: int) -> Any:
        """The collator that makes batches of episodes.

        Raises:
            ValueError: if a tokenizer is missing, or is not needed.
        """
        if tokenizer is None:
            raise ValueError("processing_class is missing: pass the base model's tokenizer")
        return EpisodeCollator(tokenizer, chunk_size)

    def check_training(self, kl_weight: float, state_learning_rate: float | None) -> None:
        """Refuse training options that this kind of task cannot use.

        Args:
            kl_weight: weight of the loss to a teacher.
            state_learning_rate: learning rate of theta(0).

        Raises:
            ValueError: if there is no teacher, or no learned theta(0).
        """
        if kl_weight and not self.has_teacher:
            raise ValueError(f"{self.called(self.config)} has no teacher, got kl_weight={kl_weight}: leave it out")
        if state_learning_rate is not None and not self.learns_start:
            raise ValueError(
                f"{self.called(self.config)} has no learned theta(0), got state_learning_rate={state_learning_rate}: "
                "leave it out"
            )

    def scored(self, batch: dict[str, Tensor]) -> Tensor:
        """Which labels of a batch of episodes have a loss. `unit` says what they are."""
        return batch["labels"][..., 1:] != NO_LOSS

    # ---------------------------------------------------------------- words

    def display_name(self) -> str:
        """The middle part of an adapter's name, between the name of the base and the fingerprint."""
        config = self.config
        return f"{config.regime} {config.state_type}-{STATES[config.state_type].size(config)}"

    def describe(self) -> list[str]:
        """The configuration in words, one line each, for model cards."""
        config = self.config
        state, head = STATES[config.state_type].describe(config), HEADS[config.head].describe(config)
        return [
            f"Regime: {config.regime} ({self.who_answers()})",
            f"State: {state}; {head}",
            f"Signal: {config.signal}",
        ]

    def who_answers(self) -> str:
        who = "base and LoRA answer" if self.config.lora_answers else "the bare base answers"
        return f"{who} a query under the state"


def is_linear(config: IAIConfig) -> bool:
    """Whether a configuration asks for a linear state, by its state type or by its task type."""
    return config.state_type == "linear" or config.task_type == "SEQ_CLS"


def is_of_vectors(config: IAIConfig) -> bool:
    """Whether a configuration asks for vectors, by either of the two fields that go together."""
    return config.vector_width is not None or config.num_outputs is not None


def task_of(config: IAIConfig) -> Task:
    """The task that a configuration describes.

    Example:
        >>> from hf_iai import IAIConfig
        >>> from hf_iai.tasks import task_of
        >>> type(task_of(IAIConfig(task_type="CAUSAL_LM"))).__name__
        'Text'
    """
    return kind_of(config)(config)
