"""From names to a VAE: the networks and components that a plain description asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.app.names import ACTIVATIONS, FAMILIES, LIKELIHOODS, PRIORS
from pyro_vae.errors import InputError, unknown_name
from pyro_vae.vae import VAE


@dataclass(frozen=True)
class Architecture:
    """What a VAE is made of, by the names of :mod:`pyro_vae.app.names`.

    Attributes:
        prior: name of the prior.
        likelihood: name of the likelihood.
        guide: name of the variational family.
        latent_dim: size of the latent vector.
        hidden: widths from the data to the latent side; the decoder mirrors them.
        activation: name of the activation.
        num_components: components of the prior; by default its own number, for ``vamp`` a tenth of
            the data and at most 500.
        sigma: the Gaussian likelihood's: a number, ``"learned"`` or ``"per-pixel"``.
    """

    prior: str
    likelihood: str
    guide: str
    latent_dim: int
    hidden: tuple[int, ...]
    activation: str
    num_components: int | None = None
    sigma: float | str = "learned"

    def check_names(self) -> None:
        """Refuse an unknown name, and say the nearest right one.

        Raises:
            InputError: a name that nothing answers to.
        """
        for kind, name, known in (
            ("prior", self.prior, PRIORS),
            ("likelihood", self.likelihood, LIKELIHOODS),
            ("guide", self.guide, FAMILIES),
            ("activation", self.activation, ACTIVATIONS),
        ):
            if name not in known:
                raise unknown_name(kind, name, known)


def build_vae(architecture: Architecture, data_shape: tuple[int, ...], num_data: int) -> VAE:
    """Build the VAE that is described, its weights drawn from the global random state.

    Args:
        architecture: what it is made of.
        data_shape: shape of one datum.
        num_data: number of training data.

    Raises:
        InputError: an unknown name, or sizes out of range.
    """
    architecture.check_names()
    hidden, activation = architecture.hidden, architecture.activation
    try:
        encoder = networks.MLPEncoder(data_shape, hidden, activation=activation)
        decoder = networks.MLPDecoder(architecture.latent_dim, hidden[::-1], activation=activation)
        guide = getattr(guides, FAMILIES[architecture.guide])(encoder, architecture.latent_dim)
        prior = _prior(architecture, guide, data_shape, num_data)
        options: dict[str, Any] = {}
        if architecture.likelihood == "gaussian":
            options["sigma"] = architecture.sigma
        kind = getattr(likelihoods, LIKELIHOODS[architecture.likelihood])
        return VAE(prior, kind(decoder, data_shape, **options), guide)
    except RuntimeError as error:  # torch's word for memory that is not there
        widths = ",".join(map(str, hidden))
        raise InputError(
            f"expected networks that fit in memory, got hidden widths {widths} and latent "
            f"dimension {architecture.latent_dim}: make them smaller"
        ) from error


def start_at_data(vae: VAE, train: Tensor) -> None:
    """Start a VAE of :func:`build_vae` at its training data ``(N, *data_shape)``.

    The decoder's first mean is the data's, and a VampPrior's pseudo-inputs are data.
    """
    assert isinstance(vae.likelihood, likelihoods.Likelihood)
    vae.likelihood.start_at_mean(train.mean(0))
    if isinstance(vae.prior, priors.VampPrior):
        vae.prior.start_at_data(train)


def _prior(
    architecture: Architecture, guide: nn.Module, data_shape: tuple[int, ...], num_data: int
) -> nn.Module:
    number = architecture.num_components
    if architecture.prior == "vamp":
        # A tenth of the data keeps a step's cost near that of the batch; 500 is the paper's number.
        number = max(1, min(500, num_data // 10)) if number is None else number
        bounded = architecture.likelihood != "gaussian"
        return priors.VampPrior(guide, data_shape, num_pseudo_inputs=number, unit_interval=bounded)
    if architecture.prior == "gaussian-mixture" and number is not None:
        return priors.GaussianMixture(architecture.latent_dim, number)
    return getattr(priors, PRIORS[architecture.prior])(architecture.latent_dim)
