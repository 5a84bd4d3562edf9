"""Estimates of log p(x) and what they rest on. Names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Bidirectional": "bracket",
    "LogMarginal": "estimate",
    "bidirectional": "bracket",
    "log_marginal": "importance",
    "to_arviz": "diagnostics",
}

__all__ = ["Bidirectional", "LogMarginal", "bidirectional", "log_marginal", "to_arviz"]

if TYPE_CHECKING:
    from pyro_vae.evaluation.bracket import Bidirectional, bidirectional
    from pyro_vae.evaluation.diagnostics import to_arviz
    from pyro_vae.evaluation.estimate import LogMarginal
    from pyro_vae.evaluation.importance import log_marginal


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"pyro_vae.evaluation.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyro_vae.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
