"""Checks of the options that many functions share; each is made before any work is done."""

from __future__ import annotations

from typing import Any

from pyro_vae.errors import whole_number


def check_counts(*, least: int = 1, **counts: Any) -> None:
    """Refuse numbers, given by name, that are not whole or below ``least``."""
    for name, count in counts.items():
        whole_number(name, count, least=least)


def check_max_memory(max_memory: Any) -> None:
    """Refuse a number of bytes that is not whole or below 1; None stands for the default."""
    if max_memory is not None:
        check_counts(max_memory=max_memory)
