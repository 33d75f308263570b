"""Whether a name can be the id of a repository on the Hub."""

import os

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: str | os.PathLike | None, *, with_owner: bool = False) -> bool:
    """Whether a name is a valid id and no folder of that name exists here.

    Args:
        name: a path or an id.
        with_owner: accept only ids of the form `"owner/name"`, so that a mistyped folder is not looked up on the Hub.
    """
    if not isinstance(name, str) or not name or os.path.isdir(name):
        return False
    if with_owner and (name.count("/") != 1 or name.startswith(".")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
