"""Core: all that an adapter learns besides LoRA, and one refinement step h_phi."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..bases.base import Base, Prefix
from ..config import IAIConfig
from ..label_names import Names
from ..predictions.likelihoods import likelihood_of
from ..state import Identity, TaskState
from ..states import HypernetworkState, LinearState, LoraState, MLPState, PrefixState, PromptState
from ..tensors import NO_LOSS


class Core(nn.Module, ABC):
    """theta(0), what a chunk says, and how the state is refined.

    Subclasses say what `read` finds in a chunk alone, so that many chunks can be read in one batch, and what `_next`
    makes of it and the state.

    Args:
        base: the transformer; its embeddings give theta(0) and the slots their first values.
        config: the adapter's configuration.
        reads: whether the base reads chunks out, into slots.
    """

    def __init__(self, base: Base, config: IAIConfig, *, reads: bool) -> None:
        super().__init__()
        self.config = config
        self.state = _state_type(base, config, reads=reads)

    @property
    def kind(self) -> str:
        """How states were accumulated; only averages merge."""
        return self.config.accumulation if self.config.signal == "observations" else self.config.signal

    def initial_state(self, base: Base, batch_size: int, identity: Identity) -> TaskState:
        """theta(0) for `batch_size` tasks."""
        tensors = self._initial(base, batch_size)
        zero = torch.zeros(batch_size, dtype=torch.long, device=next(iter(tensors.values())).device)
        return TaskState(tensors, zero, zero.clone(), identity, self.kind)

    def first_of_episode(self, base: Base, batch_size: int, *labels: Tensor | None) -> TaskState:
        """theta(0) in training; `labels` are those of the chunks and of the queries."""
        return self.initial_state(base, batch_size, Identity("", "in training"))

    @abstractmethod
    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        """The tensors of theta(0)."""

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:  # (B, C) each
        """Evidence of a chunk that does not depend on the state; `mask` is part of it."""
        # What stands under the mask must not even route: experts compute all tokens that chose them in one batch.
        return {"ids": ids.masked_fill(mask == 0, 0), "mask": mask, "labels": labels.masked_fill(mask == 0, NO_LOSS)}

    def met(self, state: TaskState, names: tuple[Names, ...] | None) -> TaskState:
        """The state with room for the classes of each task that have been met; there are none but of a linear state."""
        return state

    def step(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> TaskState:
        """theta(i+1) = h(theta(i), evidence). Rows that read no token keep their state bitwise."""
        num_tokens = evidence["mask"].sum(1)  # (B,)
        read = num_tokens > 0
        tensors = {
            name: torch.where(read.view(-1, *[1] * (t.dim() - 1)), t, state.tensors[name])
            for name, t in self._next(base, state, evidence).items()
        }
        return replace(state, tensors=tensors, step=state.step + read, num_tokens=state.num_tokens + num_tokens)

    @abstractmethod
    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of theta(i+1)."""

    @contextmanager
    def under(self, base: Base, state: TaskState) -> Iterator[Prefix]:
        """Passes inside are answers under the state, if read behind what it yields."""
        with self.state.under(base, self.corrected(base, state)) as prefix:
            yield prefix

    def check_answers_without_state(self) -> None:
        """Refuse where there is no answer without a state."""

    def answer(self, base: Base, state: TaskState, ids: Tensor, mask: Tensor, labels: Tensor | None = None, **kwargs):
        """transformers' own output for queries (N, T) under the state."""
        with self.under(base, state) as prefix:
            return base.answer(prefix, ids, mask, labels, **kwargs)

    def corrected(self, base: Base, state: TaskState) -> dict[str, Tensor]:
        """The state as a query sees it: all m slots, in the layout of the state type, after any learned correction."""
        return self.state.visible(base, state.tensors)


def _state_type(base: Base, config: IAIConfig, *, reads: bool) -> nn.Module:
    if config.state_type == "linear":
        return LinearState(base.width)
    embeddings = base.model.get_input_embeddings().weight
    if config.state_type == "mlp":
        scores = likelihood_of(config).num_scores
        widths = (embeddings.shape[1], base.config.hidden_size) if reads else None
        return MLPState(config.vector_width, config.num_state_tokens, scores, widths)
    if config.vector_width is None:
        token_ids = torch.randint(base.vocab_size, (config.num_state_tokens,)).to(embeddings.device)
    else:  # a base of vectors has no tokens to start from: as long as its embeddings, and no two alike
        token_ids = base.embedding_length * torch.randn(
            config.num_state_tokens, embeddings.shape[1], device=embeddings.device
        )
    if config.state_type == "prompt":
        return PromptState(base, token_ids, reads=reads)
    if config.state_type == "prefix":
        return PrefixState(base, token_ids, config.num_kept_tokens, reads=reads)
    if reads:
        return HypernetworkState(base, token_ids, config.state_r, config.state_target_modules)
    return LoraState(base, config.state_r, config.state_target_modules)


def full_precision(tensor: Tensor) -> torch.autocast:
    """State and head compute in float32, also where autocast runs the base in less."""
    return torch.autocast(tensor.device.type, enabled=False)
