"""LearnedOptimizer: the learned optimizer of an IAI adapter as a torch optimizer for any parameters."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .bases.hub_ids import is_hub_id
from .files import replace_file
from .heads import LearnedStep, LearnedStepSettings
from .heads.guards import first_trust, most_rms, rms, trusted, updated_trust
from .heads.learned_step import KEPT_KINDS

FILE, FORMAT, TENSOR = "learned_optimizer.safetensors", "hf_iai.learned_optimizer.v1", "tensor at"
IN_ADAPTER = "base_model.iai.head."
KINDS_OF_NAMES = {"A": r"lora_A|_A$", "B": r"lora_B|_B$"}


class LearnedOptimizer(torch.optim.Optimizer):
    """A torch optimizer that takes the steps of a trained `heads.LearnedStep`:

        theta' = theta + lr (step(theta, gradient) - theta)

    The prompt or low-rank update of a plain PEFT model moves as the adapter's state would if it read the same text as a
    chunk. Every parameter is handled as a tensor of its own. The adapter may have learned different rates for several
    kinds of tensor. Then the name of a parameter decides which of them applies; if it does not tell, the mean of their
    logarithms is used.

    `state_dict` contains the start of the parameters, the running averages in the parameters' type, and the network
    with its settings. So a run can be continued, bitwise equal and without the adapter.

    Args:
        params: parameters, parameter groups, pairs of name and parameter, or a model (its trainable parameters). Names
            tell the `A` of a LoRA from its `B`. A Trainer passes names on if `{"model": model}` is among its keywords.
        weights: the folder or Hub id of an IAI adapter with `signal="gradients"` and `head="learned_optimizer"`; or the
            network itself.
        lr: share of the step that is taken; 1 is the step as it was trained.
        revision: revision of the Hub repository, as in `huggingface_hub.snapshot_download`.
        token: access token for the Hub, as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: if the weights are not of such an adapter, `lr` is negative, weight decay is set (it cannot be
            combined with a learned step), or a gradient is sparse.
        FileNotFoundError: if the folder contains no adapter.
        huggingface_hub's own errors.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import PromptTuningConfig, get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_iai import IAIConfig, LearnedOptimizer, embedded_base
        >>> base = AutoModelForCausalLM.from_pretrained(embedded_base())
        >>> config = IAIConfig(task_type="CAUSAL_LM", state_type="prompt", signal="gradients", regime="parametric")
        >>> tuned = AutoModelForCausalLM.from_pretrained(embedded_base())
        >>> tuned = get_peft_model(tuned, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        >>> with TemporaryDirectory() as folder:
        ...     get_peft_model(base, config).save_pretrained(folder)
        ...     optimizer = LearnedOptimizer(tuned, weights=folder)
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> before = tuned(input_ids=ids, labels=ids).loss
        >>> before.backward()
        >>> optimizer.step()
        >>> bool(tuned(input_ids=ids, labels=ids).loss < before)
        True

    With transformers' Trainer:
    `Trainer(..., optimizer_cls_and_kwargs=(LearnedOptimizer, {"model": model, "weights": folder}))`.
    """

    def __init__(
        self,
        params: Iterable | nn.Module,
        weights: str | os.PathLike | LearnedStep,
        lr: float = 1.0,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        self.net = weights if isinstance(weights, LearnedStep) else _load_net(weights, revision, token)
        self.gradient_length = 0.0
        self.trust = first_trust(torch.zeros(1, dtype=torch.double))
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if decay := self.param_groups[-1]["weight_decay"]:
            raise ValueError(f"weight_decay={decay} cannot be combined with a learned step: set it to 0")

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `learned_optimizer.safetensors`, all that `state_dict` holds, in one step.

        Args:
            folder: is made if it is missing. An earlier file in it is replaced.

        Raises:
            OSError: if nothing can be written there; an earlier file is as it was.
        """
        tensors, values = _parted(self.state_dict())
        metadata = {"format": FORMAT, "values": json.dumps(values)}
        replace_file(Path(folder, FILE), lambda path: save_file(tensors, path, metadata=metadata))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, params: Iterable | nn.Module) -> "LearnedOptimizer":
        """Go on with a saved run, bitwise as it would have gone on.

        Args:
            folder: where `save_pretrained` has written.
            params: the parameters, as they were when it was saved; as in `LearnedOptimizer`.

        Raises:
            FileNotFoundError: if the folder holds no saved optimizer.
            ValueError: if the file is damaged, or of other parameters.
        """
        state = _read_state(Path(folder, FILE))
        optimizer = cls(params, _net(state["net"]["weights"], state["net"]))
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
            _check_same(group, saved, state["state"], Path(folder, FILE))
        optimizer.load_state_dict(state)
        return optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step with every parameter that has a gradient.

        Args:
            closure: a function that computes the loss and its gradients again, and returns the loss.

        Returns:
            The closure's loss, or None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = list(self._with_gradient())
        scale = self._clipped([parameter.grad for _, parameter, _ in moved])
        less = self._trusted([parameter for _, parameter, _ in moved])
        for name, parameter, lr in moved:
            self._step(name, parameter, lr, scale, less)
        return loss

    def _with_gradient(self) -> Iterator[tuple[str, nn.Parameter, float]]:
        """Name, parameter and lr of every parameter that has a gradient."""
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is not None:
                    if parameter.grad.is_sparse:
                        raise ValueError(
                            f"parameter {name!r} has a sparse gradient: make its embedding with sparse=False"
                        )
                    yield name, parameter, group["lr"]

    def _clipped(self, gradients: list[Tensor]) -> float:
        """The factor for all gradients, below 1 if they are unusually long; see `heads.LearnedStep`."""
        length = sum(gradient.float().square().sum().item() for gradient in gradients) ** 0.5
        mean, length = (torch.tensor([x], dtype=torch.double) for x in (self.gradient_length, length))
        scale, self.gradient_length = (x.item() for x in self.net.clipped(mean, length))
        return scale

    def _trusted(self, parameters: list[nn.Parameter]) -> float:
        """The factor for all parameters' distances from their start; see `heads.guards`."""
        slope = sum((p.grad.float() * (p - self._start(p)).float()).sum().item() for p in parameters)
        doubt = self.net.settings.doubt
        self.trust, less = updated_trust(self.trust, torch.tensor([slope], dtype=torch.double), doubt)
        return less.item()

    def _start(self, parameter: nn.Parameter) -> Tensor:
        return self.state[parameter].get("start", parameter)

    def _step(self, name: str, parameter: nn.Parameter, lr: float, scale: float, less: float) -> None:
        theta, gradient = (_as_task(t.detach()) for t in (parameter, parameter.grad))
        gradient = gradient * scale
        net = self.net.to(theta.device)
        state = self.state[parameter]
        if not state:
            state |= {kind.removesuffix("_"): t for kind, t in net.initial({"": theta}).items()}
            state |= {"most_rms": most_rms(theta), "step": 0, "start": parameter.detach().clone()}
        averages = net.accumulated({kind: state[kind].to(theta.dtype) for kind in KEPT_KINDS}, gradient)
        # Rounded as they are stored, so that a run continued from a file takes the same steps.
        state |= {kind: t.to(parameter.dtype) for kind, t in averages.items()}
        averages = {kind: state[kind].to(theta.dtype) for kind in KEPT_KINDS}
        after = net.stepped(
            _kind_of(name, net), theta, averages, gradient, torch.tensor([state["step"]], device=theta.device)
        )
        start = _as_task(state["start"])
        after = trusted(theta, after, start, *(theta.new_tensor([t]) for t in (less, self.trust["trust"].item())))
        after = after * (state["most_rms"].to(theta.dtype) / rms(after)).clamp_max(1)
        state["step"] += 1
        parameter.copy_(theta.lerp(after, lr).view(parameter.shape))

    def state_dict(self) -> dict:
        net = {"weights": self.net.state_dict(), "initial_rate": self.net.initial_rate}
        net |= {"learned_optimizer": self.net.settings.to_dict(), "gradient_length": self.gradient_length}
        net |= {"trust": {name: t.item() for name, t in self.trust.items()}}
        return super().state_dict() | {"net": net}

    def load_state_dict(self, state_dict: dict) -> None:
        self.net = _net(state_dict["net"]["weights"], state_dict["net"])
        self.gradient_length = state_dict["net"]["gradient_length"]
        self.trust = {name: torch.tensor([x], dtype=torch.double) for name, x in state_dict["net"]["trust"].items()}
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "net"})


def _as_task(tensor: Tensor) -> Tensor:
    """A parameter as the state tensor of one task: (1, rows, columns, ...), in float32 or more."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.reshape(1, 1, -1) if tensor.dim() < 2 else tensor.unsqueeze(0)


def _kind_of(name: str, net: LearnedStep) -> str | None:
    """The kind of tensor, from the parameter's name; None stands for the mean of all kinds."""
    return next((k for k, pattern in KINDS_OF_NAMES.items() if k in net.log_rate and re.search(pattern, name)), None)


def _load_net(weights: str | os.PathLike, revision: str | None, token: str | bool | None) -> LearnedStep:
    if not os.path.isdir(weights) and is_hub_id(str(weights)):
        wanted = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
        weights = snapshot_download(str(weights), revision=revision, token=token, allow_patterns=wanted)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not Path(weights, name).is_file():
            raise FileNotFoundError(f"{weights} holds no adapter: {name} is missing")
    config = json.loads(Path(weights, CONFIG_NAME).read_text())
    if (found := (config.get("signal"), config.get("head"))) != ("gradients", "learned_optimizer"):
        raise ValueError(
            f"{weights} was trained with signal and head {found}: pass an IAI adapter with "
            "signal='gradients' and head='learned_optimizer'"
        )
    tensors = load_file(Path(weights, SAFETENSORS_WEIGHTS_NAME))
    tensors = {n.removeprefix(IN_ADAPTER): t for n, t in tensors.items() if n.startswith(IN_ADAPTER)}
    return _net(tensors, config)


def _net(weights: dict[str, Tensor], settings: dict) -> LearnedStep:
    """Build the network from its weights and the adapter's configuration.

    Adapters without `learned_optimizer` settings were trained with the defaults.
    """
    kinds = [name.removeprefix("log_rate.") for name in weights if name.startswith("log_rate.")]
    constants = LearnedStepSettings.from_dict(settings.get("learned_optimizer"))
    net = LearnedStep({kind: kind for kind in kinds}, settings["initial_rate"], constants)
    net.load_state_dict(weights)
    return net.requires_grad_(False)


# ---------------------------------------------------------------- files


def _parted(tree: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """The tensors of nested dictionaries and lists, by paths, and the rest with those paths in their places."""
    if isinstance(tree, Tensor):
        return {path: tree.detach().cpu().contiguous()}, {TENSOR: path}
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        parts = {key: _parted(value, f"{path}/{key}".lstrip("/")) for key, value in items}
        tensors = {name: t for found, _ in parts.values() for name, t in found.items()}
        values = {key: value for key, (_, value) in parts.items()}
        return tensors, values if isinstance(tree, dict) else list(values.values())
    return {}, tree


def _joined(values: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_parted`; keys of whole numbers are numbers again."""
    if isinstance(values, dict):
        if values.keys() == {TENSOR}:
            return tensors[values[TENSOR]]
        return {int(key) if key.isdecimal() else key: _joined(value, tensors) for key, value in values.items()}
    return [_joined(value, tensors) for value in values] if isinstance(values, list) else values


def _read_state(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no learned optimizer: {path.name} is missing")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
        return _joined(json.loads(metadata["values"]), load_file(path))
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): save the optimizer again") from error


def _check_same(group: dict, saved: dict, state: dict, path: Path) -> None:
    if len(group["params"]) != len(saved["params"]):
        raise ValueError(f"{path} is of {len(saved['params'])} parameters, got {len(group['params'])}: pass the same")
    for number, parameter in zip(saved["params"], group["params"], strict=True):
        start = state.get(number, {}).get("start", parameter)
        if start.shape != parameter.shape:
            shapes = f"{tuple(start.shape)}, got {tuple(parameter.shape)}"
            raise ValueError(f"parameter {number} of {path} has the shape {shapes}: pass the parameters in their order")
