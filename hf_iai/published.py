"""Where the published adapters lie: `adapters/` of a checkout, `hf_iai/adapters/` of an installation."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def published_adapter(name: str) -> str:
    """Folder of the published adapter `name`, in Hub layout.

    Args:
        name: the folder's name, such as `"code-prefix"`.

    Raises:
        ValueError: for an adapter that was not published; the message lists those that were.

    Example:
        >>> from pathlib import Path
        >>> from hf_iai.published import published_adapter
        >>> Path(published_adapter("code-prefix")).name
        'code-prefix'
    """
    published = {path.parent.name: path.parent for path in _adapters_folder().glob("*/adapter_config.json")}
    if name not in published:
        raise ValueError(f"adapter {name!r} is not published; choose one of {sorted(published)}")
    return str(published[name])


def _adapters_folder() -> Path:
    installed = _PACKAGE / "adapters"
    return installed if installed.is_dir() else _PACKAGE.parent / "adapters"
