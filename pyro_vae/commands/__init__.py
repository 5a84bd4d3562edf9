"""What the commands of the command line do; imported by a command, never by ``--help``."""

from pyro_vae.commands.baseline import autoencoder
from pyro_vae.commands.comparing import compare_families
from pyro_vae.commands.completing import complete
from pyro_vae.commands.exploring import interpolate, latent, traverse
from pyro_vae.commands.settings import build_vae
from pyro_vae.commands.sweeping import sweep
from pyro_vae.commands.training import Checkpointing, resume, train
from pyro_vae.commands.using import evaluate, print_estimate, reconstruct, sample

__all__ = [
    "Checkpointing",
    "autoencoder",
    "build_vae",
    "compare_families",
    "complete",
    "evaluate",
    "interpolate",
    "latent",
    "print_estimate",
    "reconstruct",
    "resume",
    "sample",
    "sweep",
    "train",
    "traverse",
]
