"""IAITuner: the tuner that PEFT drives. It holds LoRA layers in the base, and a core for each adapter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from .bases.compat import (
    READ_BY_WEIGHT,
    adapter_tensors,
    check_adapter_tensors,
    check_carries_nothing,
    read_by_weight,
    split_adapter,
)
from .bases.recurrent import base_of
from .config import IAIConfig
from .cores import Core
from .identity import fingerprint
from .reader import Reader
from .registry import STATES
from .state import Identity
from .tasks import Task, task_of
from .tensors import as_precise


class IAITuner(LoraModel):
    """Adds, switches and removes adapters; one is active at a time. `IAIModel` adds reading and answering."""

    prefix = "lora_"
    uses_shared_state = True  # makes transformers' own load_adapter refuse it with a clear message

    # ---------------------------------------------------------------- what PEFT calls

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs) -> None:
        if "iai" not in self._modules:  # the first adapter
            check_carries_nothing(model)
            self.iai = nn.ModuleDict()
            self._disabled, self._identities = False, {}
            self.card_facts = {}  # adapter -> facts about its training, for its card
        base, config = base_of(model), self.peft_config[adapter_name]
        task = task_of(config)
        task.check_base(base)
        base.prepare(config, uses_lora=config.uses_reader)
        STATES[config.state_type].complete_for_base(config, model.config)
        super().inject_adapter(model, adapter_name, **kwargs)
        trained = adapter_name in self.active_adapters and not config.inference_mode
        core = task.core(base).to(model.get_input_embeddings().weight.device)
        self.iai[adapter_name] = core.requires_grad_(trained)

    def _check_target_module_compatiblity(self, peft_config: IAIConfig, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(peft_config, model, target_name)
        if target_name in READ_BY_WEIGHT and read_by_weight(model):
            raise ValueError(
                f"target_modules names {target_name!r}, whose weight {model.config.model_type!r} reads without calling "
                "it, so LoRA would have no effect: leave it out, or use target_modules='all-linear'"
            )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"one IAI adapter can be active at a time, got {list(adapter_name)}")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, core in self.iai.items():
            core.requires_grad_(name in self.active_adapters and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.iai[adapter_name]
        self._identities.pop(adapter_name, None)
        self.card_facts.pop(adapter_name, None)

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        self._disabled = True

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._disabled = False

    def _apply(self, fn: Callable[[Tensor], Tensor], *args, **kwargs) -> nn.Module:
        """As in PyTorch, for `.half()`, `.to(...)` and such; but LoRA keeps its precision, as `Core` does."""
        lora = [p for name, p in self.model.named_parameters() if self.prefix in name]
        before = [p.data for p in lora]
        super()._apply(fn, *args, **kwargs)
        for parameter, data in zip(lora, before, strict=True):
            parameter.data = as_precise(parameter.data, data)
        return self

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, found, tail = key.partition(f"base_model.iai.{adapter_name}.")
        return f"base_model.iai.{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, config, adapter_name: str, state_dict) -> dict:
        """PEFT warns of what a file lacks, if at all, and leaves it as it is; a state read by that would be wrong."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_tensors(found, adapter_tensors(model, adapter_name))
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names mixes adapters in one batch, which IAI cannot: call set_adapter() instead")
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def merge_adapter(self, *args, **kwargs) -> None:
        raise ValueError("an IAI adapter cannot be merged into the base: its state depends on the task")

    def merge_and_unload(self, *args, **kwargs) -> nn.Module:
        self.merge_adapter()

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        raise ValueError("IAI adapters cannot be added to each other: train one on the union of their tasks")

    # ---------------------------------------------------------------- properties

    @property
    def core(self) -> Core:
        return self.iai[self.active_adapters[0]]

    @property
    def _config(self) -> IAIConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def task(self) -> Task:
        """The kind of task of the active adapter."""
        return task_of(self._config)

    @property
    def reader(self) -> Reader:
        """A reader that reads and answers with the active adapter."""
        return Reader(self.task, base_of(self.model), self.core)

    @property
    def window(self) -> int:
        """The largest number of positions in a pass of the base; `sys.maxsize` for a base without positions."""
        return base_of(self.model).window

    @property
    def num_slots(self) -> int:
        """m, the number of slots of the state; 0 for a state without slots."""
        return self._config.num_state_tokens or 0

    @property
    def max_chunk_size(self) -> int:
        """The longest chunk that fits the window: window - 2m tokens, beside m slots of theta(0) and m read-out slots.

            kind of task or state                       largest chunk
            prefix, prompt                              window - 2m tokens
            lora                                        window - m tokens; with gradients alone the whole window
            linear, vectors                             20 examples, the usual number, if they fit
            regime implicit, text                       half of the window; query and answer need places too

        Raises:
            ValueError: for a base without positions, such as Mamba, which has no window.
        """
        return self.reader.inputs.max_chunk_size

    @property
    def usual_chunk_size(self) -> int:
        """The chunk size that is used if none is given: `max_chunk_size`, or m tokens for a prefix+lora state.

        Raises:
            ValueError: as `max_chunk_size`.
        """
        return self.reader.inputs.usual_chunk_size

    @property
    def identity(self) -> Identity:
        """The fingerprint and name of the active adapter. It is recomputed only after a weight has changed."""
        name = self.active_adapters[0]
        adapter = list(self.core.named_parameters())
        placed = ((*split_adapter(path), p) for path, p in self.model.named_parameters())
        adapter += [(path, p) for of, path, p in placed if of == name]
        # Fused optimizers change values without a new version number, so norms are compared too.
        norms = torch.stack([p.detach().float().norm() for _, p in adapter]).tolist()
        versions = tuple((p.data_ptr(), _version(p), norm) for (_, p), norm in zip(adapter, norms, strict=True))
        if self._identities.get(name, (None,))[0] != versions:
            self._identities[name] = versions, fingerprint(base_of(self.model), self._config, adapter)
        return self._identities[name][1]

    # ---------------------------------------------------------------- checks

    def _refuse_when_disabled(self, what: str) -> None:
        if self._disabled:
            raise ValueError(f"{what} needs the adapter, but it is disabled: leave disable_adapter() first")


def _version(parameter: Tensor) -> int:
    """The number of changes in place; tensors made in inference mode do not count them."""
    return 0 if parameter.is_inference() else parameter._version
