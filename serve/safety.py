"""A hook that looks at every picture before a client gets it; what it looks for is the user's own.

The setting `safety_checker` names it as `module:function`, importable where the replicas run. It
is called with the picture [H, W, 3] uint8 and the prompt, in a thread of its own, and returns None,
or the reason for which the picture is held back. When it raises, no picture is given out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

from model.errors import InputError
from serve.api import ApiError

Checker = Callable[[np.ndarray, str], str | None]


def load_checker(name: str) -> Checker | None:
    """The hook that a setting names, None for an empty one. Raises InputError."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the safety checker '{name}' cannot be loaded ({error}): name an importable function."
        ) from None
    if not callable(found):
        raise InputError(f"the safety checker '{name}' is no function: name one.")
    return found


def held_back(reason: str) -> ApiError:
    """The refusal of a picture, in OpenAI's words."""
    message = f"The picture was held back by the safety checker: {reason}."
    return ApiError(400, message, code="content_policy_violation", param="prompt")
