"""A trained model held fixed while another guide is trained against it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from pyro_vae.datasets import Dataset
from pyro_vae.evaluation.frozen_model import frozen_model
from pyro_vae.pair.functions import PairFunction
from pyro_vae.vae import VAE


def take_over_model(vae: VAE, held: VAE) -> None:
    """Give a VAE the weights of another one's prior and likelihood."""
    for part in ("prior", "likelihood"):
        mine, theirs = getattr(vae, part), getattr(held, part)
        assert isinstance(mine, nn.Module)  # the commands build no other
        mine.load_state_dict(theirs.state_dict())


def frozen(vae: VAE, dataset: Dataset, device: torch.device) -> AbstractContextManager[PairFunction]:
    """Return a context in which the VAE's model is a function without anything that trains."""
    shown = dataset.test[:1].to(device)
    return frozen_model(vae.model, {"guide": vae.guide}, (shown,), device)
