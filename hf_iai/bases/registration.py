"""Registers the method "IAI" with PEFT: one enum member and three dictionary entries."""

import enum

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

SUPPORTED_PEFT = ("0.21",)


class IAIType(enum.StrEnum):
    """The method's type. Its member equals the string "IAI", by which PEFT looks methods up."""

    IAI = "IAI"


def register(config_class: type, model_class: type) -> None:
    """Register the method, so that `get_peft_model` and the AutoPeft classes accept its configuration.

    Args:
        config_class: the method's configuration class.
        model_class: the method's tuner class.

    Raises:
        ImportError: if this version was not tested with the installed release of PEFT.
    """
    if not peft.__version__.startswith(SUPPORTED_PEFT):
        raise ImportError(f"hf_iai needs peft {' or '.join(SUPPORTED_PEFT)}.x, found {peft.__version__}")
    PEFT_TYPE_TO_CONFIG_MAPPING[IAIType.IAI] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[IAIType.IAI] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[IAIType.IAI] = "iai_"
