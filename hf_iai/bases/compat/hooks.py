"""Hooks into PEFT's model class: its cards, and its status where an adapter has no layers."""

import os
from collections.abc import Callable
from functools import wraps

from peft import PeftModel
from peft.peft_model import TunerModelStatus
from peft.tuners.lora import LoraLayer


def carry_cards(method: str, update: Callable[[PeftModel, str, str], None]) -> None:
    """Let us edit the model card of adapters of `method`, whenever one is saved or pushed.

    PEFT writes a card when an adapter is saved. transformers overwrites it when the adapter is pushed, right before the
    upload. So the card is edited after each of the two.

    Args:
        method: the PEFT method whose cards are edited.
        update: called as `update(model, folder, name)` once the card is in the folder.
    """
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @wraps(create)
    def create_and_update(self, output_dir: str) -> None:
        create(self, output_dir)
        if self.peft_type == method:
            update(self, output_dir, os.path.basename(os.path.abspath(output_dir)))

    @wraps(upload)
    def update_and_upload(self, working_dir: str, repo_id: str, *args, **kwargs):
        if self.peft_type == method:
            update(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_and_update
    PeftModel._upload_modified_files = update_and_upload


def allow_no_layers(method: str) -> None:
    """Let PEFT report the status of an adapter without LoRA layers.

    PEFT asks the layers of an adapter whether they are enabled before it disables them. It fails if there are none.

    Args:
        method: the PEFT method whose adapters may have no LoRA layers.
    """
    status = PeftModel.get_model_status

    @wraps(status)
    def status_without_layers(self) -> TunerModelStatus:
        if self.peft_type != method or any(isinstance(m, LoraLayer) for m in self.base_model.modules()):
            return status(self)
        trainable, total = self.get_nb_trainable_parameters()
        return TunerModelStatus(
            base_model_type=type(self.get_base_model()).__name__,
            adapter_model_type=type(self.base_model).__name__,
            peft_types={name: method for name in self.peft_config},
            trainable_params=trainable,
            total_params=total,
            num_adapter_layers=0,
            enabled=not self.base_model._disabled,
            active_adapters=self.active_adapters,
            merged_adapters=[],
            requires_grad={},
            available_adapters=sorted(self.peft_config),
            devices={},
            quantization_backend=None,
        )

    PeftModel.get_model_status = status_without_layers
