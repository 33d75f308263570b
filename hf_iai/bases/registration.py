"""Tells PEFT about the method "IAI": one enum member and three dictionary entries."""

import enum

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

SUPPORTED_PEFT = ("0.21",)


class IAIType(enum.StrEnum):
    """Equals the string "IAI", which is how PEFT looks methods up."""

    IAI = "IAI"


def register(config_class: type, model_class: type) -> None:
    """Make `get_peft_model` and the AutoPeft classes know `IAIConfig`.

    Raises:
        ImportError: when the installed PEFT is of a series that this version was not tested with.
    """
    if not peft.__version__.startswith(SUPPORTED_PEFT):
        raise ImportError(f"hf_iai needs peft {' or '.join(SUPPORTED_PEFT)}.x, found {peft.__version__}")
    PEFT_TYPE_TO_CONFIG_MAPPING[IAIType.IAI] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[IAIType.IAI] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[IAIType.IAI] = "iai_"
