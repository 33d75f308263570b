"""Optional packages (extras), imported only when they are needed."""

from importlib import import_module
from types import ModuleType


def require_extra(module: str, extra: str = "plots") -> ModuleType:
    """Import a module that an extra of the package installs.

    Raises:
        ImportError: if it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'hf_iai[{extra}]'") from error
