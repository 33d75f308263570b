"""Methods that read a text chunk by chunk. Each gives the loss of every chunk before it learns from it.

A method is a function `(ids, C) -> losses`: token ids (1, n * C) and the size of a chunk give n losses in nats per
token, NaN where a method was not asked. No method is scored on the first token of a chunk.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_iai import IAIConfig, TaskState

Method = Callable[[Tensor, int], list[float]]
NOT_ASKED = float("nan")


def memory(base, *, slots: int, seed: int = 0, adapter: Path | None = None, **values) -> tuple[Method, torch.nn.Module]:
    """A state that keeps the loss of each chunk, prefix+lora if `values` do not say otherwise; and its model.

    With `adapter` it is the one that was trained, with `values` in place of its own.
    """
    torch.manual_seed(seed)
    if adapter is None:
        values = {"state_type": "prefix+lora", "num_state_tokens": slots} | values
        model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", **values)).eval()
    else:
        config = replace(IAIConfig.from_pretrained(adapter), **values)
        model = PeftModel.from_pretrained(base, adapter, config=config).eval()

    def read(ids: Tensor, size: int) -> list[float]:
        chunks = ({"input_ids": chunk} for chunk in ids.split(size, 1))
        return [float(state.tensors["loss"]) for state in model.adapt_steps(chunks)]

    @torch.no_grad()
    def answer_and_read(ids: Tensor, size: int) -> list[float]:
        """A chunk that is read behind nothing is not predicted by the state while it is read."""
        losses, state = [], model.initial_state()
        for chunk in ids.split(size, 1):
            losses.append(float(model(input_ids=chunk, labels=chunk, task_state=state).loss))
            state = model.adapt([{"input_ids": chunk}], state=state)
        return losses

    return answer_and_read if model.active_peft_config.read_behind == "start" else read, model


def state_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of each part of a state, at two bytes a number."""
    state: TaskState = model.initial_state()
    slots = {"key", "value", "worth", "age"}
    sizes = {name: 2 * t.numel() for name, t in state.tensors.items()}
    parts = {"slots": sum(s for n, s in sizes.items() if n in slots)}
    return parts | {"fast weights": sum(s for n, s in sizes.items() if n.endswith("_B")), "all": sum(sizes.values())}


def slot_bytes(base) -> int:
    """Bytes of a token's keys and values, at two bytes a number."""
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * heads * width


def context(base, num_tokens: int | None, asked: Collection[int] | None = None, *, begin: bool) -> Method:
    """The bare base sees the latest `num_tokens` tokens, or the whole text; `begin`: behind a beginning token."""

    @torch.no_grad()
    def read(ids: Tensor, size: int) -> list[float]:
        losses = []
        for number, chunk in enumerate(ids.split(size, 1)):
            if asked is not None and number not in asked:
                losses.append(NOT_ASKED)
                continue
            before = ids[:, : number * size]
            before = before if num_tokens is None else before[:, max(0, before.shape[1] - num_tokens) :]
            losses.append(float(_loss(base, before, chunk, begin=begin)))
        return losses

    return read


def full_context(base, asked: Iterable[int], *, begin: bool) -> Method:
    """The bare base sees the n chunks before, for each n; one pass over the whole text gives all of them."""

    @torch.no_grad()
    def read(ids: Tensor, size: int) -> list[float]:
        first = ids.new_full((1, int(begin)), _begin(base))
        text = torch.cat([first, ids], 1)
        hidden = base.base_model(text, use_cache=False).last_hidden_state[:, int(begin) :]
        return [
            float(_of_hidden(base, h, chunk)) if number in asked else NOT_ASKED
            for number, (h, chunk) in enumerate(zip(hidden.split(size, 1), ids.split(size, 1), strict=True))
        ]

    return read


def dynamic_evaluation(base, num_tokens: int, rate: float, optimizer: str, *, begin: bool, rank: int = 8) -> Method:
    """A plain LoRA takes one step on each chunk, with the latest `num_tokens` tokens before it in context.

    Source: Krause et al., Dynamic evaluation, arXiv 1709.07432.
    """
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear")
    )
    weights = [p for p in model.parameters() if p.requires_grad]

    def read(ids: Tensor, size: int) -> list[float]:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
            elif "lora_B" in name:
                torch.nn.init.zeros_(parameter)
        kinds = {
            "adam": lambda: torch.optim.Adam(weights, rate, (0.9, 0.99)),
            "sgd": lambda: torch.optim.SGD(weights, rate),
        }
        step, losses = kinds[optimizer](), []
        for number, chunk in enumerate(ids.split(size, 1)):
            before = ids[:, max(0, number * size - num_tokens) : number * size]
            loss = _loss(model.base_model.model, before, chunk, begin=begin)
            losses.append(float(loss.detach()))
            step.zero_grad()
            loss.backward()
            step.step()
        return losses

    return read


def _begin(base) -> int:
    return base.config.bos_token_id or 0


def _loss(base, before: Tensor, chunk: Tensor, *, begin: bool) -> Tensor:
    first = chunk.new_full((1, int(begin)), _begin(base))
    text = torch.cat([first, before, chunk], 1)
    return _of_hidden(base, base.base_model(text, use_cache=False).last_hidden_state[:, -chunk.shape[1] :], chunk)


def _of_hidden(base, hidden: Tensor, chunk: Tensor) -> Tensor:
    return cross_entropy(base.get_output_embeddings()(hidden[0, :-1]).float(), chunk[0, 1:])
