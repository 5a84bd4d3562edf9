"""Runs on disk: a VAE as JSON settings and safetensors weights, built back from registered names."""

from pyro_vae.runs.description import describe
from pyro_vae.runs.files import (
    CHECKPOINTS,
    CONFIG,
    FORMAT,
    WEIGHTS,
    finite_or_none,
    read_config,
    write_json,
    write_whole,
)
from pyro_vae.runs.folder import check_free, continued_run, load, locked, new_run, save
from pyro_vae.runs.weights import save_weights

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "FORMAT",
    "WEIGHTS",
    "check_free",
    "continued_run",
    "describe",
    "finite_or_none",
    "load",
    "locked",
    "new_run",
    "read_config",
    "save",
    "save_weights",
    "write_json",
    "write_whole",
]
