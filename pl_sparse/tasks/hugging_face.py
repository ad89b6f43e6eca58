"""The library transformers, and what it finds under a name. Needs the extra `transformers`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pl_sparse.core import optional

__all__ = ["pretrained_from", "transformers_library"]


def transformers_library() -> Any:
    """The library transformers, quiet.

    Raises:
        ImportError: the extra of that name is missing.
    """
    library = optional.library("transformers", "a model of Hugging Face", "transformers")
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()  # that the classifier is new is meant so
    return library


def pretrained_from(auto: Any, path: str, **options: Any) -> Any:
    """What an auto class of transformers finds under a folder or a name on the hub."""
    path = os.path.expanduser(path)
    if (path.startswith((".", "/")) or path.count("/") > 1) and not Path(path).is_dir():
        raise FileNotFoundError(f"path={path} is not a folder of a pretrained model")
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path={path}: no pretrained model can be read from such a folder, nor from the hub under this name "
            f"({optional.beginning(error)})"
        ) from error
