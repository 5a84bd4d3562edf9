"""Runs on disk: a VAE as JSON settings and safetensors weights, built back from registered names."""

from pyro_vae.runs.folder import load, save

__all__ = ["load", "save"]
