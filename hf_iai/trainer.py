"""IAITrainer: a thin `transformers.Trainer` over episodes."""

import math
import random

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer

from .data import EpisodeCollator
from .training_args import IAITrainingArguments


class IAITrainer(Trainer):
    """Trains an IAI adapter on episodes, `{"support": [...], "query": [...]}`.

    Args:
        model: an IAI PeftModel, or a base model or its id together with `peft_config`.
        args: `IAITrainingArguments`.
        peft_config: `IAIConfig` to wrap `model` with.
        processing_class: the tokenizer; loaded with the model when the model is an id.

    Raises:
        ValueError: when `peft_config` and `model` do not fit together, the tokenizer is missing, or
            `state_learning_rate` cannot be honoured.

    `evaluate` logs `eval_loss`, under all chunks, and `eval_loss_at_chunks_{n}`, under the n right before the query.
    """

    def __init__(
        self,
        model: PeftModel | nn.Module | str,
        args: IAITrainingArguments,
        *,
        peft_config: PeftConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> None:
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError("peft_config was given, but the model is a PeftModel already: pass one of the two")
            torch.manual_seed(args.seed)
            model = get_peft_model(model, peft_config)
        if getattr(getattr(model, "active_peft_config", None), "peft_type", None) != "IAI":
            raise ValueError(
                f"IAITrainer needs an IAI adapter, got {type(model).__name__}: "
                "pass peft_config=IAIConfig(task_type='CAUSAL_LM')"
            )
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the base model's tokenizer")
        if args.state_learning_rate is not None and kwargs.get("optimizers", (None, None))[0] is not None:
            raise ValueError("state_learning_rate was given, but optimizers= brings its own rates: pass one of the two")
        collator = EpisodeCollator(processing_class, args.chunk_size or model.max_chunk_size)
        kwargs.setdefault("data_collator", collator)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        # Our loss is a mean over query tokens: Trainer must not rescale it by its own count of labels.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._iai.objective = args.make_objective()

    @property
    def _iai(self):
        return self.accelerator.unwrap_model(self.model).base_model

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not made_before and self.args.state_learning_rate is not None:
            self._set_apart(optimizer, set(self._iai.core.state.start.parameters()))
        return optimizer

    def _set_apart(self, optimizer: torch.optim.Optimizer, start: set[nn.Parameter]) -> None:
        """Move theta(0) into groups with a learning rate of their own."""
        groups, optimizer.param_groups = optimizer.param_groups, []
        for group in groups:
            for params, rate in (
                ([p for p in group["params"] if p not in start], group["lr"]),
                ([p for p in group["params"] if p in start], self.args.state_learning_rate),
            ):
                if params:
                    optimizer.add_param_group({**group, "params": params, "lr": rate})
        found = {p for group in optimizer.param_groups for p in group["params"]}
        if not start <= found:
            raise ValueError("state_learning_rate: this optimizer does not hold theta(0) as it is; leave it None")

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        draw = random.Random(f"{self.args.seed} {self.state.global_step}")  # equal on all ranks, and after a resume
        self._iai.objective.draw = draw
        inputs = self._halved(inputs) if draw.random() < self.args.halve_chunks else inputs
        inputs = last_chunks(inputs, self._draw_num_chunks(draw))
        return super().training_step(model, inputs, num_items_in_batch)

    def _draw_num_chunks(self, draw: random.Random) -> int:
        ramp = self.args.curriculum * self.state.max_steps
        grown = 1.0 if ramp == 0 else min(1.0, (self.state.global_step + 1) / ramp)
        fewest = self.args.min_chunks
        most = max(fewest, round(self.args.max_chunks * grown))
        drawn = int(math.exp(draw.uniform(math.log(fewest), math.log(most + 1))))
        return min(self.args.max_chunks, max(fewest, drawn))

    @staticmethod
    def _halved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        chunks, size = inputs["chunk_input_ids"].shape[1:]
        if size % 2:
            return inputs
        split = {n: t.reshape(len(t), chunks * 2, size // 2) for n, t in inputs.items() if n.startswith("chunk_")}
        return inputs | split

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        eval_dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(eval_dataset, dict):  # super() has come back here once for each of them
            return metrics
        curve = self._loss_at_chunks(eval_dataset)
        curve = {f"{metric_key_prefix}_loss_at_chunks_{n}": loss for n, loss in curve.items()}
        self.log(curve)
        return metrics | curve

    @torch.no_grad()
    def _loss_at_chunks(self, dataset) -> dict[int, float]:
        """Mean loss of the queries' tokens after the n nearest chunks, for each n of `eval_chunks` that exists."""
        self.model.eval()
        counts = self.args.eval_chunks
        sums = torch.zeros(len(counts), 2, device=self.args.device)  # loss and tokens
        for inputs in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(inputs)
            tokens = (inputs["labels"][..., 1:] != -100).sum().float()
            for i, n in enumerate(counts):
                if n <= inputs["chunk_input_ids"].shape[1]:
                    with self.compute_loss_context_manager():
                        loss = self.model(**last_chunks(inputs, n)).loss
                    sums[i] += torch.stack([loss.float() * tokens, tokens])
        sums = self.accelerator.reduce(sums, "sum")
        return {n: (loss / tokens).item() for n, (loss, tokens) in zip(counts, sums, strict=True) if tokens}


def last_chunks(inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The episode with only the n chunks that lie right before the query."""
    start = max(0, inputs["chunk_input_ids"].shape[1] - n)
    return {name: t[:, start:] if name.startswith("chunk_") else t for name, t in inputs.items()}
