"""What was measured of a run, kept beside it: an interrupted comparison need not repeat it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.comparison_result import Measured
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.files import write_whole

MEASURED = "measured.safetensors"

_QUANTITIES = ("elbo", "iwae", "log_prob", "annealed", "rate", "distortion")
_ESTIMATE = "estimate."
_PLAIN = ("exact_kl", "num_parameters", "num_guide_parameters", "seconds_per_1000")


def save_measured(measured: Measured, likelihood: str, folder: Path) -> None:
    """Write numbers per datum, plain numbers and the likelihood's kind into a run folder."""
    tensors: dict[str, Tensor] = {}
    for name in _QUANTITIES:
        quantity: PerDatum | None = getattr(measured, name)
        if quantity is not None:
            tensors[name], tensors[f"{name}_standard_error"] = quantity.value, quantity.standard_error
    for part in fields(LogMarginal):
        value = getattr(measured.estimate, part.name)
        if isinstance(value, Tensor):
            tensors[_ESTIMATE + part.name] = value
    plain = json.dumps({name: getattr(measured, name) for name in _PLAIN})
    notes = {"plain": plain, "likelihood": likelihood}
    # Contiguous copies: safetensors refuses views that share memory.
    content = serialised({name: value.clone() for name, value in tensors.items()}, notes)
    write_whole(folder / MEASURED, lambda path: path.write_bytes(content))


def load_measured(folder: Path) -> tuple[Measured, str]:
    """Read the numbers and the likelihood's kind that :func:`save_measured` wrote."""
    path = folder / MEASURED
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = file.metadata()
        estimate = {
            name.removeprefix(_ESTIMATE): value
            for name, value in tensors.items()
            if name.startswith(_ESTIMATE)
        }
        quantities: dict[str, Any] = {
            name: PerDatum(tensors[name], tensors[f"{name}_standard_error"])
            for name in _QUANTITIES
            if name in tensors
        }
        measured = Measured(
            **{"annealed": None, "posterior_divergence": None, "fit": None, **quantities},
            **json.loads(notes["plain"]),
            estimate=LogMarginal(**estimate),
        )
        return measured, notes["likelihood"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"expected the numbers of a comparison in {path}, got none that can be read: delete it"
        ) from error
