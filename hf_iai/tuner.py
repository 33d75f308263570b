"""IAITuner: what PEFT asks of a tuner, and what it holds: LoRA in the base, and a core for each adapter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraModel
from torch import nn

from .bases.base import Base
from .bases.compat import READ_BY_WEIGHT, default_target_modules, read_by_weight
from .bases.recurrent import base_of
from .config import IAIConfig
from .cores import Core, make_core
from .identity import fingerprint
from .objectives import Objective
from .state import Identity
from .tasks.classification import LabelledInputs
from .tasks.inputs import Inputs
from .tasks.refined_text import ImplicitInputs
from .tasks.regression import GaussianInputs
from .tasks.vectors import RefinedVectorInputs, VectorInputs


class IAITuner(LoraModel):
    """Adapters come, go and are switched; one is active at a time. What it does with a task: `IAIModel`."""

    prefix = "lora_"
    uses_shared_state = True  # transformers' own load_adapter then refuses it with a clear message

    # ---------------------------------------------------------------- what PEFT calls

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs) -> None:
        if "iai" not in self._modules:  # the first adapter
            self.iai = nn.ModuleDict()
            self.objective = Objective()
            self._disabled, self._using, self._identities = False, [], {}
        base, config = base_of(model), self.peft_config[adapter_name]
        if config.regime == "implicit":
            base.check_implicit()
        else:
            base.check_state_type(config.state_type)
        base.prepare(config)
        if config.state_type == "lora":
            # Saved as it is, so that another version of PEFT, which may choose otherwise, loads the same state.
            targets = config.state_target_modules or default_target_modules(model.config)
            config.state_target_modules = targets if isinstance(targets, str) else sorted(targets)
        super().inject_adapter(model, adapter_name, **kwargs)
        trained = adapter_name in self.active_adapters and not config.inference_mode
        self.iai[adapter_name] = make_core(base, config).requires_grad_(trained)

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

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        self._disabled = True

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._disabled = False

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, found, tail = key.partition(f"base_model.iai.{adapter_name}.")
        return f"base_model.iai.{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)

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
    def _base(self) -> Base:
        return base_of(self.model)

    @property
    def window(self) -> int:
        """Positions the base has; `sys.maxsize` for one without positions."""
        return self._base.window

    @property
    def num_slots(self) -> int:
        """m, the slots of the state; a linear one has none."""
        return self._config.num_state_tokens or 0

    @property
    def _inputs(self) -> Inputs:
        if self._config.regime == "implicit":
            kind = ImplicitInputs if self._config.vector_width is None else RefinedVectorInputs
            return kind(self._base, self._config, slots_in_front=0)
        if self._config.vector_width is not None:
            return VectorInputs(self._base, self._config, self.core.state.num_slots_in_front)
        labelled = {"softmax": LabelledInputs, "gaussian": GaussianInputs}[self._config.likelihood]
        kind = labelled if self._config.state_type == "linear" else Inputs
        return kind(self._base, self._config, self.core.state.num_slots_in_front)

    @property
    def max_chunk_size(self) -> int:
        """window - 2m: a chunk is read between theta(0), which takes no place of a lora state, and m read-out slots.

        Of a linear state, which any number of examples fits, the usual number: 20; of vectors the same, if it fits. In
        regime implicit half the window.

        Raises:
            ValueError: for a base without positions, such as Mamba, which has no window.
        """
        return self._inputs.max_chunk_size

    @property
    def identity(self) -> Identity:
        """Recomputed only after a weight has changed."""
        name = self.active_adapters[0]
        adapter = list(self.core.named_parameters())
        adapter += [(n.replace(f".{name}", ""), p) for n, p in self.model.named_parameters() if f".{name}." in n]
        # Fused optimizers change values without counting a version: the norms see them.
        norms = torch.stack([p.detach().float().norm() for _, p in adapter]).tolist()
        versions = tuple((p.data_ptr(), p._version, norm) for (_, p), norm in zip(adapter, norms, strict=True))
        if self._identities.get(name, (None,))[0] != versions:
            self._identities[name] = versions, fingerprint(self._base, self._config, adapter)
        return self._identities[name][1]

    # ---------------------------------------------------------------- switches and checks

    def _predictor_lora(self):
        """Explicit, implicit: base + LoRA answers. Parametric, and inside `disable_adapter()`: the bare base."""
        return self._base.lora(self._config.regime != "parametric" and not self._disabled)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _refuse_when_disabled(self, what: str) -> None:
        if self._disabled:
            raise ValueError(f"{what} needs the adapter, but it is disabled: leave disable_adapter() first")

    def _refuse_of_vectors(self, what: str) -> None:
        if (width := self._config.vector_width) is not None:
            raise ValueError(
                f"{what} is for text, but vector_width={width}: ask with model(inputs_embeds=..., task_state=...)"
            )

    def _refuse_when_implicit(self, what: str) -> None:
        if self._config.regime == "implicit":
            raise ValueError(
                f"{what} makes a task state, which regime='implicit' does not have: the state belongs to the query. "
                "Use refine(chunks, query), or regime='explicit'"
            )
