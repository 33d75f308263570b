"""Task: one kind of task. It says what is read and answered, what is learned, and how that is measured.

`hf_iai.registry.kind_of` finds the kind of a configuration; this folder alone asks which kind it is.
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

    To add a kind, write a subclass and register it: `@TASKS.register("name")`.

    Attributes:
        likelihoods, task_type: the values of these fields of `IAIConfig` that the kind knows.
        metric: of its curve: `"loss"`, `"accuracy"` or `"squared_error"`.
        unit: of its training loss.
        pipeline_tag: its task on the Hub.
        exports: what a state can be exported to: `"peft"`, `"classifier"`.
        auto_class: loads a base.
        makes_states: whether chunks are read into a task state (`adapt`); else queries refine predictions (`refine`).
        reads_vectors: whether observations are vectors, which need no tokenizer.
        has_teacher: whether the bare base can be the teacher of `kl_weight`.
        learns_start: whether theta(0) is learned, so that it may have a learning rate of its own.
        refuses: name of a method of the model -> why it cannot work.
        card_intro, card_example: what a model card says; `{model_id}` and the like are filled in.
    """

    likelihoods: tuple[str, ...] = ("softmax",)
    task_type = "CAUSAL_LM"
    metric, unit, pipeline_tag = "loss", "nats per token", "text-generation"
    exports: frozenset[str] = frozenset()
    auto_class: Any = AutoModelForCausalLM
    makes_states, reads_vectors, has_teacher, learns_start = True, False, True, True
    refuses: dict[str, str] = {}
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
        """Whether a configuration describes this kind."""

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
    def parts(cls, config: IAIConfig) -> list[type[Part]]:
        """All that the configuration has chosen, in the order in which it is checked."""
        signal = SIGNALS[config.signal]
        signal.complete(config)
        return [cls, signal, HEADS[config.head], STATES[config.state_type]]

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        """Whether the base, with LoRA, reads chunks out into slots."""
        return SIGNALS[config.signal].reads_out(config)

    @classmethod
    def called(cls, config: IAIConfig) -> str:
        """What the configuration has chosen, for error messages."""
        return f"state_type={config.state_type!r}, signal={config.signal!r}, head={config.head!r}"

    # ---------------------------------------------------------------- the model

    def check_base(self, base: Base) -> None:
        """
        Raises:
            ValueError: for a base that cannot do this kind of task.
        """
        base.check_offers(STATES[self.config.state_type].needs, f"state_type={self.config.state_type!r}")

    @abstractmethod
    def core(self, base: Base) -> Core:
        """What is learned."""

    @abstractmethod
    def inputs(self, base: Base, core: Core) -> Inputs:
        """Checks chunks and queries, and lays them out."""

    def check_can(self, method: str) -> None:
        """
        Raises:
            ValueError: for a method of the model that cannot work for this kind.
        """
        if method in self.refuses:
            raise ValueError(self.refuses[method].format(method=method, config=self.config))

    # ---------------------------------------------------------------- training

    def collator(self, tokenizer: PreTrainedTokenizerBase | None, chunk_size: int) -> Any:
        """Turns episodes into batches.

        Raises:
            ValueError: for a tokenizer that is missing, or has no use.
        """
        if tokenizer is None:
            raise ValueError("processing_class is missing: pass the base model's tokenizer")
        return EpisodeCollator(tokenizer, chunk_size)

    def check_training(self, kl_weight: float, state_learning_rate: float | None) -> None:
        """
        Raises:
            ValueError: for a teacher, or a rate of theta(0), where there is none.
        """
        if kl_weight and not self.has_teacher:
            raise ValueError(f"{self.called(self.config)} has no teacher, got kl_weight={kl_weight}: leave it out")
        if state_learning_rate is not None and not self.learns_start:
            raise ValueError(
                f"{self.called(self.config)} has no learned theta(0), got state_learning_rate={state_learning_rate}: "
                "leave it out"
            )

    def scored(self, batch: dict[str, Tensor]) -> Tensor:
        """Which labels of a batch of episodes have a loss; `unit` says what they are."""
        return batch["labels"][..., 1:] != NO_LOSS

    # ---------------------------------------------------------------- words

    def display_name(self) -> str:
        """Between the base's name and the fingerprint in an adapter's name."""
        config = self.config
        return f"{config.regime} {config.state_type}-{STATES[config.state_type].size(config)}"

    def describe(self) -> list[str]:
        """The configuration in words, a line each, for model cards."""
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
    """Whether a configuration asks for a linear state, by its name or by the task type that goes with it."""
    return config.state_type == "linear" or config.task_type == "SEQ_CLS"


def task_of(config: IAIConfig) -> Task:
    """The kind of task that a configuration describes.

    Example:
        >>> from hf_iai import IAIConfig
        >>> from hf_iai.tasks import task_of
        >>> type(task_of(IAIConfig(task_type="CAUSAL_LM"))).__name__
        'Text'
    """
    return kind_of(config)(config)
