"""What a trained pair is used for."""

from pyro_vae.tasks.generation import generate, reconstruct

__all__ = ["generate", "reconstruct"]
