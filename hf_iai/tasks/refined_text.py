"""ImplicitInputs: chunks and queries of regime `implicit`.

Axes: B tasks, C tokens of a chunk, N queries of T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..predictions.answers import Answers, FreeAnswer, LabelSet, label_tensors
from ..predictions.prediction import Prediction
from ..predictions.queries import Queries, prompts_of
from .inputs import Chunk, Inputs

Labels = Sequence[Sequence[int]]  # token ids of each


class ImplicitInputs(Inputs):
    """Checks what a model whose state is a query's own prediction is given."""

    @property
    def max_chunk_size(self) -> int:
        """Half the window: query and answer stand behind the chunk."""
        return self.base.window // 2

    def _check_chunk_length(self, length: int) -> None:
        """Checked together with the query."""

    def asked(self, query: Chunk, labels: Labels | None, num_answer_tokens: int | None) -> tuple[Queries, Answers]:
        """The prompts (N, T) of `refine`, and what may be answered."""
        ids, mask = self._on_device(query)
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"query needs input_ids (queries, tokens), got shape {tuple(ids.shape)}")
        self._check_ids(ids)
        given = query.get("labels")
        queries, answers = prompts_of(ids, mask, None if given is None else given.to(ids.device))
        if labels is not None:
            if num_answer_tokens is not None:
                raise ValueError(f"labels have their own lengths, got num_answer_tokens={num_answer_tokens} too")
            return queries, self.label_set(*label_tensors(labels, ids.device), len(queries))
        if num_answer_tokens is None:
            num_answer_tokens = 1 if answers is None else answers.shape[1]
        if num_answer_tokens < 1:
            raise ValueError(f"num_answer_tokens must be at least 1, got {num_answer_tokens}")
        return queries, FreeAnswer(num_answer_tokens)

    def label_set(self, ids: Tensor, mask: Tensor, num_queries: int) -> LabelSet:  # (B, C, L), or (1, C, L) for all
        """For N queries, N / B consecutive ones of each task."""
        if ids.dim() != 3 or mask.shape != ids.shape or num_queries % len(ids):
            raise ValueError(
                f"label_input_ids and their mask must be (tasks, labels, tokens), got {tuple(ids.shape)} and "
                f"{tuple(mask.shape)} for {num_queries} queries"
            )
        self._check_ids(ids)
        if self.config.prediction == "latent" and ids.shape[2] > 1:
            raise ValueError(
                f"prediction='latent' says one token at a time, but a label has {ids.shape[2]}: use labels of one "
                "token, or prediction='logits'"
            )
        times = num_queries // len(ids)
        return LabelSet(ids.repeat_interleave(times, 0), mask.repeat_interleave(times, 0))

    def check_episode_fits(self, chunk_ids: Tensor, chunk_mask: Tensor, start: Prediction) -> None:  # (B, K, C)
        self._check_ids(chunk_ids)
        self.check_fits(chunk_mask[:, :1].flatten(1), start.queries, start.answers)

    def check_fits(self, chunk_mask: Tensor, queries: Queries, answers: Answers) -> None:  # (B, C)
        """
        Raises:
            ValueError: for queries that cannot be shared out among B tasks, or what is longer than the window.
        """
        rows, length = chunk_mask.shape[0], chunk_mask.shape[-1]
        if not rows or len(queries) % rows:
            raise ValueError(f"{len(queries)} queries for a chunk of {rows} tasks: pass as many queries for each")
        asked, behind, window = queries.ids.shape[1], answers.length, self.base.window
        if length + asked + behind > window:
            raise ValueError(
                f"a chunk of {length} tokens, a query of {asked} and an answer of {behind} do not fit a window of "
                f"{window} together; pass chunk_size <= {max(0, window - asked - behind)}"
            )

    def episode(
        self,
        ids: Tensor,  # (B, Q, T), as mask and labels
        mask: Tensor,
        labels: Tensor,
        label_ids: Tensor | None,  # (B, C, L), as their mask
        label_mask: Tensor | None,
    ) -> tuple[Queries, Answers, Tensor]:
        """An episode's prompts, what may be answered, and the targets (B * Q, S)."""
        if labels is None:
            raise ValueError("an episode of regime='implicit' needs labels (B, Q, T): they say where the answer begins")
        self._check_ids(ids)
        queries, answers = prompts_of(*(t.flatten(0, 1) for t in (ids, mask, labels)))
        if label_ids is None:
            space = FreeAnswer(answers.shape[1])
        else:
            label_mask = torch.ones_like(label_ids) if label_mask is None else label_mask
            space = self.label_set(label_ids, label_mask, len(queries))
        return queries, space, space.targets(answers)
