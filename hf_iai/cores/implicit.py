"""Regime `implicit`: the state is a query's own prediction, refined by each chunk."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..bases.base import Base
from ..config import IAIConfig
from ..predictions.answers import Answers
from ..predictions.prediction import PREDICTIONS, PassOutput, Prediction
from ..predictions.queries import Queries, read_keys_values
from .core import Core, EpisodeBatch, full_precision


class ImplicitCore(Core):
    """yhat(i+1) = r_gamma([x, yhat(i)], chunk(i)).

    One pass over [chunk][query x][slots] gives all that a step needs. The slots hold the current prediction, as the
    expected embedding of the answer under it, plus a learned embedding, 0 at first. Of the logits l = yhat,

        l(i+1) = l(i) + w (log p(. | chunk, x) - log p(. | x)) + gate * scores(h),     l(0) = log p(. | x)
        w      = 2 sigmoid(<a, norm(h)> + b)

    h is the slot's last hidden state, and `scores` what the output embeddings make of it. With a = b = gate = 0, where
    training starts, this is a product of experts: Bayes' rule for chunks that are independent given the answer. What
    training adds is in the base's LoRA, active in every pass, which learns to say no more than it knows; in w, with
    which a chunk abstains or counts twice; and in the gated scores of slots that have seen chunk, query and prediction.

    Predictions kept as probabilities or latents: `states.prediction`.

    Source: Mittal et al., arXiv 2510.11471, equation 4; the product of experts is ours.
    """

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(config)
        self.kind = PREDICTIONS[config.prediction]()
        self.slot = nn.Parameter(torch.zeros(base.model.get_input_embeddings().weight.shape[1]))
        self.weight = nn.Parameter(torch.zeros(base.config.hidden_size))
        self.offset = nn.Parameter(torch.zeros(()))
        self.gate = nn.Parameter(torch.zeros(()))

    def begin(self, base: Base, episode: EpisodeBatch) -> Prediction:
        """yhat(0) of an episode's queries."""
        return self.first(base, Queries(episode.ids, episode.mask), episode.answers)

    def score(self, base: Base, states: list[Prediction], episode: EpisodeBatch) -> Any:
        """`loss` is the mean over the predictions; `logits` are those of the last one."""
        answers = states[-1].answers
        logits = [self.logits(base, state) for state in states]
        losses = [answers.loss(one, episode.labels) for one in logits]
        return CausalLMOutput(loss=torch.stack(losses).mean(), logits=answers.output(logits[-1]))

    def answer(self, base: Base, state: Prediction) -> Tensor:
        """What the queries' answers are now, as a caller sees them."""
        return state.answers.output(self.logits(base, state))

    def first(self, base: Base, queries: Queries, answers: Answers) -> Prediction:
        """yhat(0), what base and LoRA say without a chunk.

        Token a of a free answer is predicted behind the predictions of those before it, so that A passes make A of
        them final, one after the other; gradient goes to the last pass alone.
        """
        nothing = self.slot.new_zeros(len(queries), answers.num_slots, len(self.slot))
        with torch.set_grad_enabled(torch.is_grad_enabled() and answers.num_slots == 1):
            outlook = self._outlook(base, queries, answers, None, nothing)
        for number in range(1, answers.num_slots):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number == answers.num_slots - 1):
                slots = answers.embedded(base, outlook.log_probs)
                outlook = self._outlook(base, queries, answers, None, slots)
        prior = None if answers.depends_on_itself else outlook.log_probs
        return Prediction(self.kind.start(outlook), queries, answers, prior)

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:  # (B, C) each
        """What depends on a chunk alone: its keys and values, which all queries share."""
        with base.lora(True):
            return read_keys_values(base, base.embed(ids.masked_fill(mask == 0, 0)), mask)

    def step(self, base: Base, state: Prediction, evidence: dict[str, Tensor]) -> Prediction:
        """yhat(i+1). Queries of a task whose chunk has no token keep their prediction bitwise."""
        queries, answers = state.queries, state.answers
        slots = answers.embedded(base, self.logits(base, state))
        outlook = self._outlook(base, queries, answers, evidence, slots)
        prior = state.prior
        if prior is None:
            prior = self._outlook(base, queries, answers, None, slots).log_probs
        with full_precision(prior):
            score = nn.functional.rms_norm(outlook.slots, self.weight.shape) @ self.weight + self.offset  # (N, S)
            correction = self.gate * self._scores(base, answers, outlook.slots)
            weight = 2 * score.sigmoid().unsqueeze(-1)
            tensors = self.kind.include(state.tensors, answers, outlook, prior, weight, correction)
        read = evidence["mask"].any(1).repeat_interleave(len(queries) // len(evidence["mask"]), 0).view(-1, 1, 1)
        return replace(state, tensors={name: torch.where(read, t, state.tensors[name]) for name, t in tensors.items()})

    def logits(self, base: Base, state: Prediction) -> Tensor:  # (N, S, V)
        """Of the answers: free tokens (N, A, vocabulary), or labels (N, 1, C)."""
        with base.lora(True):
            return self.kind.logits(base, state)

    def _outlook(
        self,
        base: Base,
        queries: Queries,
        answers: Answers,
        chunk: dict[str, Tensor] | None,
        slots: Tensor,  # (N, S, d)
    ) -> PassOutput:
        with base.lora(True):
            before, own = queries.followed_by(base, chunk, slots + self.slot.to(slots.dtype))
            log_probs = answers.log_probs(base, queries, chunk, before)
        return PassOutput(before.float(), log_probs, own.float())

    def _scores(self, base: Base, answers: Answers, slots: Tensor) -> Tensor:  # (N, S, d)
        """What the slots add, before the gate."""
        if self.kind.latent:
            return slots
        with base.lora(True):
            return answers.scores(base, slots.to(base.model.dtype))
