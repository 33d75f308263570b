"""Where the published adapters and the card template lie: beside the package in a checkout, in it once installed."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def published_adapter(name: str) -> str:
    """Folder of the published adapter `name`, in Hub layout.

    Args:
        name: the folder's name, such as `"code-prefix"`.

    Raises:
        ValueError: for an adapter that was not published; the message lists those that were.

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
    """Of all published adapters."""
    return sorted(path.parent.name for path in data_folder("adapters").glob("*/adapter_config.json"))


def data_folder(name: str) -> Path:
    """`adapters` or `model_cards`."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
