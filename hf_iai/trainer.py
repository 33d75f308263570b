"""IAITrainer: a `transformers.Trainer` for episodes."""

import inspect
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerBase, Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from .bases.compat import most_on_all_ranks
from .config import IAIConfig
from .hub.cards import CardFacts, Measurement, installed_versions, is_edited, model_card
from .model import IAIModel
from .tasks import Task, task_of
from .tensors import NO_LOSS
from .training_args import IAITrainingArguments

LOST = "Connection closed by peer"  # of torch.distributed
CURVE = re.compile(r"(.+)_loss_at_chunks_(\d+)")  # the names that `evaluate` logs


class IAITrainer(Trainer):
    """Trains an IAI adapter on episodes, rows `{"support": [...], "query": [...]}`.

    The model reads the support chunk by chunk; the loss is taken on the query. Rows of text are in one of TRL's formats
    (`{"text"}`, `{"prompt", "completion"}`, `{"messages"}`). Linear states need labelled rows, `{"text", "label"}` or
    `{"vector", "label"}`; adapters with `vector_width` need `{"vector", "label"}`.

    `evaluate` logs `eval_loss`, the loss after all chunks, and `eval_loss_at_chunks_{n}`, the loss after the n chunks
    right before the query. `push_to_hub` writes a card with the facts of the run and the last of these curves.

    Args:
        model: an IAI PeftModel; or, with `peft_config`, a base model or its id; or None with `model_init`, a function
            that makes an IAI PeftModel, as a search over hyperparameters needs it.
        args: `IAITrainingArguments`.
        peft_config: the `IAIConfig` of a new adapter on `model`.
        processing_class: the tokenizer. If the model is an id, it is loaded with the model. Leave it out for vectors.

    Raises:
        ValueError: if `peft_config` and `model` do not fit together, the tokenizer is missing or not needed, or the
            task has no use for `kl_weight` or `state_learning_rate`; or if an argument of transformers has no use here
            (docs/options.md).
    """

    def __init__(
        self,
        model: PeftModel | nn.Module | str | None,
        args: IAITrainingArguments,
        *,
        peft_config: PeftConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> None:
        _check_arguments(args)
        if isinstance(model, str):
            task = task_of(peft_config) if isinstance(peft_config, IAIConfig) else None
            if task is None or not task.reads_vectors:
                processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = (Task if task is None else task).auto_class.from_pretrained(model)
        if peft_config is not None:
            if model is None or isinstance(model, PeftModel):
                found = "comes from model_init" if model is None else "is a PeftModel already"
                raise ValueError(f"peft_config was given, but the model {found}: pass one of the two")
            torch.manual_seed(args.seed)
            model = get_peft_model(model, peft_config)
        made = _made_by(kwargs.get("model_init")) if model is None else model
        task = _checked_task(made, args, kwargs.get("optimizers", (None, None))[0])
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = task.collator(processing_class, args.chunk_size or made.usual_chunk_size)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        # The loss is a mean over query tokens already, so Trainer must not rescale it by its own count of labels.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False

    @property
    def _iai(self) -> IAIModel:
        return self.accelerator.unwrap_model(self.model).base_model

    @property
    def task(self) -> Task:
        """The kind of task of the active adapter."""
        return self._iai.task

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`. The adapter's card then says how it was trained, wherever it is saved."""
        try:
            result = super().train(*args, **kwargs)
        except RuntimeError as error:
            if LOST in str(error):
                raise RuntimeError("another process of this training has ended: see its own message, above") from error
            raise
        self._note_for_card()
        return result

    def _note_for_card(self) -> None:
        """Leave what the card says with the model; sharded weights have no fingerprint to compare it with."""
        if self.is_world_process_zero() and not self.is_fsdp_enabled:
            self._iai.card_facts[self._iai.active_adapters[0]] = self._card_facts()

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not made_before and self.args.state_learning_rate is not None:
            self._set_apart(optimizer, set(self._iai.core.state.start.parameters()))
        return optimizer

    def _set_apart(self, optimizer: torch.optim.Optimizer, start: set[nn.Parameter]) -> None:
        """Move theta(0) to parameter groups with a learning rate of their own."""
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
        inputs = self._halved(inputs) if draw.random() < self.args.halve_chunks else inputs
        inputs = last_chunks(inputs, self._draw_num_chunks(draw))
        inputs["objective"] = self.args.make_objective(draw)
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
        rows, chunks, size = _chunked(inputs).shape[:3]
        if size % 2:
            return inputs
        chunked = {name: t for name, t in inputs.items() if name.startswith("chunk_")}
        return inputs | {name: t.reshape(rows, chunks * 2, size // 2, *t.shape[3:]) for name, t in chunked.items()}

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self._iai.active_adapters[0] in self._iai.card_facts:
            self._note_for_card()
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers; but queries and answers may differ in length, and `evaluate` gets the curve too."""
        with self._batches_of_any_shape():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if description == "Evaluation":
            curve = self._loss_at_chunks(dataloader)
            output.metrics.update({f"{metric_key_prefix}_loss_at_chunks_{n}": loss for n, loss in curve.items()})
        if self.args.eval_do_concat_batches:
            output = output._replace(predictions=joined(output.predictions), label_ids=joined(output.label_ids))
        return output

    @contextmanager
    def _batches_of_any_shape(self) -> Iterator[None]:
        """A context in which transformers keeps batches apart; it could join them along one padded axis only."""
        concat, compute = self.args.eval_do_concat_batches, self.compute_metrics
        if compute is not None and concat and not self.args.batch_eval_metrics:
            self.compute_metrics = lambda found: compute(
                EvalPrediction(*map(joined, (found.predictions, found.label_ids, found.inputs, found.losses)))
            )
        self.args.eval_do_concat_batches = False
        try:
            yield
        finally:
            self.args.eval_do_concat_batches, self.compute_metrics = concat, compute

    def prediction_step(self, *args, **kwargs) -> tuple[Tensor | None, Any, Any]:
        """As in transformers; processes pad their batches to one shape, to be gathered."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, self._same_on_all(logits), self._same_on_all(labels)

    def _same_on_all(self, found: Any) -> Any:
        if not isinstance(found, Tensor):
            return found
        for axis in range(1, found.dim()):
            found = self.accelerator.pad_across_processes(found, dim=axis, pad_index=NO_LOSS)
        return found

    @torch.no_grad()
    def _loss_at_chunks(self, dataloader: DataLoader) -> dict[int, float]:
        """The mean loss after the n nearest chunks, for each n of `eval_chunks` that the episodes have."""
        self.model.eval()
        counts = self.args.eval_chunks
        sums = torch.zeros(len(counts), 2, device=self.args.device)  # sum of losses, number of tokens
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            tokens = self.task.scored(inputs).sum().float()
            num_chunks = _chunked(inputs).shape[1]
            most = most_on_all_ranks(self.model, num_chunks)  # sharded processes make the same passes
            for i, n in enumerate(counts):
                if n <= most:
                    with self.compute_loss_context_manager():
                        loss = self.model(**last_chunks(inputs, n)).loss
                if n <= num_chunks:
                    sums[i] += torch.stack([loss.float() * tokens, tokens])
        sums = self.accelerator.reduce(sums, "sum")
        return {n: (loss / tokens).item() for n, (loss, tokens) in zip(counts, sums, strict=True) if tokens}

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` in `output_dir`, unless somebody has edited it. `push_to_hub` calls this method.

        Args:
            language, license, tags: metadata of the card.
            model_name: title of the card. None: the name of the folder.
            dataset, dataset_args: names of the data and of its configuration, in words.
            dataset_tags: Hub ids of the data.
            finetuned_from, tasks: accepted as in `transformers.Trainer`, but not used; the adapter's configuration
                decides.
        """
        if not self.is_world_process_zero():
            return
        output = Path(self.args.output_dir)
        if is_edited(output / "README.md"):
            return
        facts = replace(
            self._card_facts(", ".join([*_listed(dataset), *_listed(dataset_args)]), _listed(dataset_tags)),
            name=model_name or output.name,
            license=license,
            language=language,
            tags=tuple(_listed(tags)),
        )
        model_card(self.task.config, facts).save(output / "README.md")

    def _card_facts(self, data: str = "", dataset_tags: Sequence[str] = ()) -> CardFacts:
        """The facts about this run for the card; `data` names the dataset in words."""
        data = data or ", ".join(dataset_tags) or "data without a name"
        return CardFacts(
            name=Path(self.args.output_dir).name,
            model_id=self.hub_model_id or Path(self.args.output_dir).name,
            chunk_size=self.args.chunk_size,
            training_data=f"{data}{_num_episodes(self.train_dataset)}",
            hyperparameters=self._hyperparameters(),
            measurements=self._measurements(data, list(dataset_tags)),
            datasets=list(dataset_tags) or None,
            versions=installed_versions(),
            weights=self._iai.identity.fingerprint[:8],
        )

    def _hyperparameters(self) -> dict[str, object]:
        own = (
            "chunk_size min_chunks max_chunks curriculum halve_chunks objective truncation_window scored_states "
            "kl_weight state_learning_rate"
        )
        return extract_hyperparameters_from_trainer(self) | {name: getattr(self.args, name) for name in own.split()}

    def _measurements(self, data: str, dataset_tags: list[str]) -> tuple[Measurement, ...]:
        """The last curve of each evaluation set, or the curve of the step whose weights were loaded at the end."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        last = {}
        for entry in self.state.log_history:
            curve = [(found[1], int(found[2]), entry[key]) for key in entry if (found := CURVE.fullmatch(key))]
            if curve and best in (None, entry["step"]):
                last[curve[0][0]] = entry["step"], [{"method": "iai", "num_chunks": n, "loss": x} for _, n, x in curve]
        return tuple(
            Measurement(
                rows,
                data_name=f"the evaluation set `{name}` ({data})",
                data_type=dataset_tags[0] if dataset_tags else name,
                unit=self.task.unit,
                measured_by=f"`IAITrainer.evaluate` at step {step} of {self.state.max_steps}",
            )
            for name, (step, rows) in last.items()
        )


def joined(batches: Any) -> Any:
    """Arrays (B, ...) of several batches as one, padded by -100 at the end of every axis; None stays None.

    Example:
        >>> joined([np.ones((1, 2)), np.ones((1, 3))]).tolist()
        [[1.0, 1.0, -100.0], [1.0, 1.0, 1.0]]
    """
    if not isinstance(batches, list) or not batches:
        return batches
    if isinstance(batches[0], tuple):
        return tuple(joined(list(parts)) for parts in zip(*batches, strict=True))
    most = np.max([batch.shape[1:] for batch in batches], axis=0)
    pads = [[(0, 0), *((0, new - old) for old, new in zip(b.shape[1:], most, strict=True))] for b in batches]
    return np.concatenate([np.pad(b, pad, constant_values=NO_LOSS) for b, pad in zip(batches, pads, strict=True)])


def _check_arguments(args: Any) -> None:
    if not isinstance(args, IAITrainingArguments):
        raise ValueError(
            f"args are {type(args).__name__}: pass IAITrainingArguments, which has the same fields and more"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would leave the objective out, which scores several "
            "states of an episode: leave it 0"
        )


def _made_by(model_init: Callable | None) -> nn.Module:
    """The model of a Trainer's `model_init`, to see what it is."""
    if model_init is None:
        raise ValueError("model is None: pass a model, or model_init=, a function that makes one")
    return model_init(None) if len(inspect.signature(model_init).parameters) == 1 else model_init()


def _checked_task(model: nn.Module, args: IAITrainingArguments, optimizer: Any) -> Task:
    """The kind of task of a model that can be trained so.

    Raises:
        ValueError: if it is no IAI model, or the task or optimizer has no use for an argument.
    """
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) != "IAI":
        raise ValueError(
            f"IAITrainer needs an IAI adapter, got {type(model).__name__}: "
            "pass peft_config=IAIConfig(task_type='CAUSAL_LM')"
        )
    task = task_of(model.active_peft_config)
    task.check_training(args.kl_weight, args.state_learning_rate)
    if args.state_learning_rate is not None and optimizer is not None:
        raise ValueError("state_learning_rate was given, but optimizers= brings its own rates: pass one of the two")
    return task


def last_chunks(inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The episode with only the n chunks right before the query."""
    start = max(0, _chunked(inputs).shape[1] - n)
    return {name: t[:, start:] if name.startswith("chunk_") else t for name, t in inputs.items()}


def _chunked(inputs: dict[str, Tensor]) -> Tensor:
    """Any of the chunk tensors. The first axes of all of them are (B, K, C)."""
    return next(t for name, t in inputs.items() if name.startswith("chunk_"))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _num_episodes(dataset) -> str:
    return f", {len(dataset)} episodes" if has_length(dataset) else ""
