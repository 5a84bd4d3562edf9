"""What the commands of the command line do; imported by a command, never by ``--help``."""

from pyro_vae.commands.settings import build_vae
from pyro_vae.commands.training import train
from pyro_vae.commands.using import evaluate, print_estimate, reconstruct, sample

__all__ = ["build_vae", "evaluate", "print_estimate", "reconstruct", "sample", "train"]
