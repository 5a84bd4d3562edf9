"""Runs on disk: a VAE as JSON settings and safetensors weights, the weights alone of any pair."""

from pyro_vae.runs.folder import load, save
from pyro_vae.runs.pairs import load_pair, save_pair

__all__ = ["load", "load_pair", "save", "save_pair"]
