"""The parameters of callables."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

#: How to ask for annotations that need not be evaluated, and for those of which some cannot be.
AS_TEXT: dict[str, Any] = {}
PARTLY: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    from annotationlib import Format

    AS_TEXT["annotation_format"], PARTLY["format"] = Format.STRING, Format.FORWARDREF


def signature_of(func: Callable[..., object]) -> inspect.Signature:
    """
    What a callable takes. Its annotations are not evaluated, and since Python 3.14 they are text.

    Raises:
        ValueError: It has no signature, or an annotation that raises even so: on Python 3.14, `"Order" | None`.
    """
    try:
        return inspect.signature(func, **AS_TEXT)
    except Exception as error:  # an annotation is any code
        raise ValueError(str(error)) from None


def annotations_of(func: Callable[..., object]) -> dict[str, Any]:
    """The annotations of a function as written; since Python 3.14, forward references if evaluation fails."""
    return inspect.get_annotations(func, **PARTLY)


def takes(func: Callable[..., object], count: int, *, unknown: bool = True) -> bool:
    """Whether a callable can be called with this many arguments; `unknown` if it has no signature."""
    try:
        signature_of(func).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return unknown
    return True
