"""From settings to a VAE: what was asked for is checked before anything is read or written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pyro_vae import datasets, guides, likelihoods, networks, priors
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, unknown_name
from pyro_vae.infer.pair import seeded
from pyro_vae.infer.training import check_options
from pyro_vae.names import (
    ACTIVATIONS,
    FAMILIES,
    LIKELIHOODS,
    METHODS,
    PRIORS,
    EvaluateSettings,
    TrainSettings,
)
from pyro_vae.vae import VAE


def checked(settings: TrainSettings) -> TrainSettings:
    """Refuse names and numbers out of range before anything heavy happens."""
    for kind, name, known in (
        ("prior", settings.prior, PRIORS),
        ("likelihood", settings.likelihood, LIKELIHOODS),
        ("guide", settings.guide, FAMILIES),
        ("activation", settings.activation, ACTIVATIONS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    if settings.binarize is not None and settings.binarize not in datasets.BINARIZATIONS:
        raise unknown_name("binarisation", settings.binarize, datasets.BINARIZATIONS)
    check_seed(settings.seed)
    _sigma(settings.sigma)
    check_options(
        settings.epochs,
        settings.batch_size,
        settings.learning_rate,
        settings.beta,
        warmup_epochs(settings),
        settings.patience,
    )
    with seeded(settings.seed):
        _components(settings, (1,), 10)  # a stand-in: sizes are refused before any data are read
    if settings.binarize is None:
        bits = settings.likelihood == "bernoulli"
        settings = replace(settings, binarize="dynamic" if bits else "none")
    return _with_absolute_paths(settings)


def build_vae(settings: TrainSettings, dataset: Dataset) -> VAE:
    """Build the VAE that the settings name, ready to be trained on this data set.

    Raises:
        InputError: sizes out of range, or data the likelihood is not defined for.
    """
    vae = _components(settings, dataset.data_shape, len(dataset.train))
    for part in (dataset.train, dataset.validation, dataset.test):
        if len(part):
            vae.check_data(part)
    assert isinstance(vae.likelihood, likelihoods.Likelihood)
    vae.likelihood.start_at_mean(dataset.train.mean(0))
    if isinstance(vae.prior, priors.VampPrior):
        vae.prior.start_at_data(dataset.train)
    return vae


def _components(settings: TrainSettings, data_shape: tuple[int, ...], num_data: int) -> VAE:
    hidden, activation = _hidden(settings.hidden), settings.activation
    try:
        encoder = networks.MLPEncoder(data_shape, hidden, activation=activation)
        decoder = networks.MLPDecoder(settings.latent_dim, hidden[::-1], activation=activation)
        guide = getattr(guides, FAMILIES[settings.guide])(encoder, settings.latent_dim)
        prior = _prior(settings, guide, data_shape, num_data)
        options: dict[str, Any] = {}
        if settings.likelihood == "gaussian":
            options["sigma"] = _sigma(settings.sigma)
        kind = getattr(likelihoods, LIKELIHOODS[settings.likelihood])
        return VAE(prior, kind(decoder, data_shape, **options), guide)
    except RuntimeError as error:  # torch's word for memory that is not there
        raise InputError(
            f"expected networks that fit in memory, got hidden widths {settings.hidden} and latent "
            f"dimension {settings.latent_dim}: make them smaller"
        ) from error


def _prior(
    settings: TrainSettings, guide: nn.Module, data_shape: tuple[int, ...], num_data: int
) -> nn.Module:
    number = settings.num_components
    if settings.prior == "vamp":
        # A tenth of the data keeps a step's cost near that of the batch; 500 is the paper's number.
        number = max(1, min(500, num_data // 10)) if number is None else number
        bounded = settings.likelihood != "gaussian"
        return priors.VampPrior(guide, data_shape, num_pseudo_inputs=number, unit_interval=bounded)
    if settings.prior == "gaussian-mixture" and number is not None:
        return priors.GaussianMixture(settings.latent_dim, number)
    return getattr(priors, PRIORS[settings.prior])(settings.latent_dim)


def check_evaluation(how: EvaluateSettings) -> None:
    """Refuse options of an evaluation that are out of range, before anything is read."""
    if how.method not in METHODS:
        raise unknown_name("method", how.method, METHODS)
    for name in ("num_samples", "num_chains", "num_steps", "num_data"):
        value = getattr(how, name)
        if value is not None and value < 1:
            raise InputError(
                f"expected --{name.replace('_', '-')} of at least 1, got {value}: leave it out for "
                "the default"
            )
    check_seed(how.seed)


def check_seed(seed: int) -> None:
    """Refuse a seed that is not in NumPy's range."""
    if not 0 <= seed < 2**32:
        raise InputError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")


def _with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Return the settings as they must be recorded to find the data from any other folder."""
    path = Path(settings.dataset)
    if path.suffix in datasets.FILE_TYPES:
        return replace(settings, dataset=str(path.expanduser().absolute()))
    if settings.dataset == "digits":  # comes with scikit-learn
        return settings
    return replace(settings, data_root=str(datasets.root_of(settings.data_root)))


def _hidden(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise InputError(
            f"expected hidden widths as whole numbers of at least 1 between commas, got {text!r}: "
            "e.g. 512,256"
        )
    return widths


def _sigma(text: str) -> float | str:
    if text in ("learned", "per-pixel"):
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"expected sigma as a positive number, 'learned' or 'per-pixel', got {text!r}"
        ) from None


def warmup_epochs(settings: TrainSettings) -> int:
    """Return the warm-up as told; by default a tenth of the run, which keeps the latents in use."""
    if settings.warmup_epochs is None:
        return settings.epochs // 10
    return settings.warmup_epochs
