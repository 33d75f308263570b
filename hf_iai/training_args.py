"""IAITrainingArguments: the settings of `IAITrainer`."""

import random
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .objectives import Objective


@dataclass
class IAITrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, plus how episodes are read in training.

    The number of chunks differs from step to step. It is drawn log-uniformly from `min_chunks` up to a limit, which
    grows to `max_chunks` over the first `curriculum` of the steps. So the adapter learns to work with few and with many
    chunks.

    Args:
        chunk_size: C, tokens per chunk. None: the most that the base can read, window - 2m.
        max_chunks: K, the largest number of chunks that a training step reads.
        min_chunks: the smallest number. If a query may be about any chunk, set it to `max_chunks`, with
            `halve_chunks=0`.
        curriculum: share of the steps over which the limit grows, 0 to 1; 0: none.
        halve_chunks: probability of a step in which every chunk is cut in two, so that the length of chunks varies too.
        objective, truncation_window, scored_states, kl_weight: see `hf_iai.objectives.Objective`.
        learning_rate: peak learning rate, 1e-3 by default. The default of `transformers.TrainingArguments` is 5e-5.
        state_learning_rate: learning rate of theta(0). Prefixes and soft prompts need a larger one than LoRA. None:
            `learning_rate`.
        eval_chunks: the numbers of chunks n at which `evaluate` logs `eval_loss_at_chunks_{n}`. Numbers larger than an
            episode has are left out.

    Raises:
        ValueError: for a value that is out of range.

    Example:
        >>> from hf_iai import IAITrainingArguments
        >>> IAITrainingArguments(output_dir="out", max_chunks=4).objective
        'unrolled'
    """

    chunk_size: int | None = field(default=None, metadata={"help": "tokens per chunk; None: window - 2m"})
    max_chunks: int = field(default=8, metadata={"help": "the most chunks a training step reads"})
    min_chunks: int = field(default=1, metadata={"help": "the fewest chunks a training step reads"})
    curriculum: float = field(default=0.5, metadata={"help": "share of steps over which max_chunks is reached"})
    halve_chunks: float = field(default=0.25, metadata={"help": "probability of a step with chunks of half length"})
    objective: str = field(default="unrolled", metadata={"help": "unrolled, truncated or greedy"})
    truncation_window: int = field(default=4, metadata={"help": "chunks with gradient, objective 'truncated'"})
    scored_states: str = field(default="doubling", metadata={"help": "states with a loss: doubling, last or next"})
    kl_weight: float = field(default=0.0, metadata={"help": "weight of the KL to the full-context bare base"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate, of everything but theta(0)"})
    state_learning_rate: float | None = field(default=None, metadata={"help": "of theta(0); None: learning_rate"})
    eval_chunks: tuple[int, ...] = field(default=(0, 1, 2, 4, 8, 16), metadata={"help": "chunk counts evaluated"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be False: episodes are collated"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None, got {self.chunk_size}")
        if self.max_chunks < 0:
            raise ValueError(f"max_chunks must be at least 0, got {self.max_chunks}")
        if not 1 <= self.min_chunks <= max(1, self.max_chunks):
            raise ValueError(f"min_chunks must lie in 1..max_chunks = {self.max_chunks}, got {self.min_chunks}")
        if 1 < self.max_chunks == self.min_chunks and self.halve_chunks:
            raise ValueError(
                f"min_chunks = max_chunks = {self.max_chunks} asks for all chunks in every step, but "
                f"halve_chunks={self.halve_chunks} leaves the earlier halves out: set halve_chunks=0"
            )
        if self.state_learning_rate is not None and self.state_learning_rate <= 0:
            raise ValueError(f"state_learning_rate must be above 0 or None, got {self.state_learning_rate}")
        for name in ("curriculum", "halve_chunks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the episodes' columns: leave it False")
        self.make_objective()

    def make_objective(self, draw: random.Random | None = None) -> Objective:
        """The objective of one training step, with `draw` as its source of randomness."""
        chosen = (self.objective, self.truncation_window, self.scored_states, self.kl_weight)
        return Objective(*chosen) if draw is None else Objective(*chosen, draw)
