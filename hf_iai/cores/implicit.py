"""Regime `implicit`: the state is a query's own prediction, which each chunk updates."""

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
    """Refines predictions: yhat(i+1) = r_gamma([x, yhat(i)], chunk(i)).

    A step needs one pass over [chunk][query x][slots]. The slots hold the current prediction, as the expected embedding
    of the answer, plus a learned embedding that starts at 0. The prediction is kept as logits l:

        l(i+1) = l(i) + w (log p(. | chunk, x) - log p(. | x)) + gate * scores(h),     l(0) = log p(. | x)
        w      = 2 sigmoid(<a, norm(h)> + b)

    h is the last hidden state of the slot. `scores` are the answers' scores that the output embeddings give for h.

    Training starts with a = b = gate = 0. This is a product of experts: Bayes' rule for chunks that are independent
    given the answer. Training adds three things. The LoRA of the base, active in every pass, learns calibrated
    predictions. The weight w lets a chunk abstain (w = 0) or count twice (w = 2). The gated scores come from slots that
    have seen chunk, query and current prediction.

    `predictions.prediction` describes predictions that are kept as probabilities or latents.

    Source: Mittal et al., arXiv 2510.11471, equation 4; the product of experts is ours.
    """

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(config)
        self.form = PREDICTIONS[config.prediction]()
        self.slot = nn.Parameter(torch.zeros(base.model.get_input_embeddings().weight.shape[1]))
        self.weight = nn.Parameter(torch.zeros(base.config.hidden_size))
        self.offset = nn.Parameter(torch.zeros(()))
        self.gate = nn.Parameter(torch.zeros(()))

    def begin(self, base: Base, episode: EpisodeBatch) -> Prediction:
        """yhat(0) for the queries of an episode."""
        return self.first(base, Queries(episode.ids, episode.mask), episode.answers)

    def score(self, base: Base, states: list[Prediction], episode: EpisodeBatch) -> Any:
        """The model output: `loss` is the mean over all predictions, `logits` are those of the last one."""
        answers = states[-1].answers
        logits = [self.logits(base, state) for state in states]
        losses = [answers.loss(one, episode.labels) for one in logits]
        return CausalLMOutput(loss=torch.stack(losses).mean(), logits=answers.output(logits[-1]))

    def output(self, base: Base, state: Prediction) -> Tensor:
        """The current answers to the queries, in the form that a caller gets."""
        return state.answers.output(self.logits(base, state))

    def first(self, base: Base, queries: Queries, answers: Answers) -> Prediction:
        """yhat(0), the prediction of base and LoRA without a chunk.

        Token a of a free answer is predicted given the predictions of the tokens before it. So A tokens take A passes;
        each pass makes one more token final. Gradients flow through the last pass only.
        """
        nothing = self.slot.new_zeros(len(queries), answers.num_slots, len(self.slot))
        with torch.set_grad_enabled(torch.is_grad_enabled() and answers.num_slots == 1):
            said = self._pass(base, queries, answers, None, nothing)
        for number in range(1, answers.num_slots):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number == answers.num_slots - 1):
                slots = answers.embedded(base, said.log_probs)
                said = self._pass(base, queries, answers, None, slots)
        prior = None if answers.depends_on_itself else said.log_probs
        return Prediction(self.form.start(said), queries, answers, prior)

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:  # (B, C) each
        """The evidence: the keys and values of a chunk, which all its queries share."""
        with base.lora(True):
            return read_keys_values(base, base.embed(ids.masked_fill(mask == 0, 0)), mask)

    def step(self, base: Base, state: Prediction, evidence: dict[str, Tensor]) -> Prediction:
        """yhat(i+1). If a task's chunk has no tokens, its queries keep their predictions bitwise."""
        queries, answers = state.queries, state.answers
        slots = answers.embedded(base, self.logits(base, state))
        said = self._pass(base, queries, answers, evidence, slots)
        prior = state.prior
        if prior is None:
            prior = self._pass(base, queries, answers, None, slots).log_probs
        with full_precision(prior):
            score = nn.functional.rms_norm(said.slots, self.weight.shape) @ self.weight + self.offset  # (N, S)
            correction = self.gate * self._scores(base, answers, said.slots)
            weight = 2 * score.sigmoid().unsqueeze(-1)
            tensors = self.form.include(state.tensors, answers, said, prior, weight, correction)
        read = evidence["mask"].any(1).repeat_interleave(len(queries) // len(evidence["mask"]), 0).view(-1, 1, 1)
        return replace(state, tensors={name: torch.where(read, t, state.tensors[name]) for name, t in tensors.items()})

    def logits(self, base: Base, state: Prediction) -> Tensor:  # (N, S, V)
        """The logits of the answers: free tokens (N, A, V), or labels (N, 1, C)."""
        with base.lora(True):
            return self.form.logits(base, state)

    def _pass(
        self,
        base: Base,
        queries: Queries,
        answers: Answers,
        chunk: dict[str, Tensor] | None,
        slots: Tensor,  # (N, S, d)
    ) -> PassOutput:
        """One pass over [chunk][query][slots], or without a chunk if it is None."""
        with base.lora(True):
            before, own = queries.followed_by(base, chunk, slots + self.slot.to(slots.dtype))
            log_probs = answers.log_probs(base, queries, chunk, before)
        return PassOutput(before.float(), log_probs, own.float())

    def _scores(self, base: Base, answers: Answers, slots: Tensor) -> Tensor:  # (N, S, d)
        """The correction by the slots, before the gate."""
        if self.form.latent:
            return slots
        with base.lora(True):
            return answers.scores(base, slots.to(base.model.dtype))
