"""agatool: text-based person search with Attention-Guided Alignment. Importing it does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {"load": "agatool.checkpoint", "PersonSearchModel": "agatool.model", "AttentionMaps": "agatool.model"}
__all__ = ["AttentionMaps", "PersonSearchModel", "__version__", "load"]

if TYPE_CHECKING:
    from agatool.checkpoint import load
    from agatool.model import AttentionMaps, PersonSearchModel


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agatool' has no attribute {name!r}")
