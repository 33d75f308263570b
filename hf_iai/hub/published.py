"""Folders of the published adapters and the card template: beside the package in a checkout, inside it if installed."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def published_adapter(name: str) -> str:
    """The folder of a published adapter, in Hub layout.

    Args:
        name: name of the folder, such as `"code-prefix"`.

    Raises:
        ValueError: if no such adapter was published; the message lists the published ones.

    Example:
        >>> from pathlib import Path
        >>> from hf_iai.hub.published import published_adapter
        >>> Path(published_adapter("code-prefix")).name
        'code-prefix'
    """
    if name not in published_names():
        raise ValueError(f"adapter {name!r} is not published; choose one of {published_names()}")
    return str(data_folder("adapters") / name)


def published_names() -> list[str]:
    """The names of all published adapters."""
    return sorted(path.parent.name for path in data_folder("adapters").glob("*/adapter_config.json"))


def data_folder(name: str) -> Path:
    """The folder `adapters` or `model_cards`."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
