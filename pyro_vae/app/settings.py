"""From settings to a VAE: what was asked for is checked before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pyro_vae import datasets, infer
from pyro_vae.app import building
from pyro_vae.app.building import Architecture
from pyro_vae.app.names import COMPILE, METHODS, OBJECTIVES, EvaluateSettings, TrainSettings
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, unknown_name
from pyro_vae.infer.bounds import Bound
from pyro_vae.infer.settings import FitSettings
from pyro_vae.pair.functions import seeded
from pyro_vae.vae import VAE

_IWAE_PARTICLES = 5  # the smaller number of Burda et al. 2016


# Steps of the shortest warm-up: eight epochs of the digits give up their latents without one, and use
# them after one of 84 steps.
_WARMUP_STEPS = 120


def checked(settings: TrainSettings) -> TrainSettings:
    """Refuse names and numbers out of range before anything heavy happens."""
    architecture = _architecture(settings)
    architecture.check_names()
    if settings.binarize is not None and settings.binarize not in datasets.BINARIZATIONS:
        raise unknown_name("binarisation", settings.binarize, datasets.BINARIZATIONS)
    if settings.compile not in COMPILE:
        raise unknown_name("choice of compile", settings.compile, COMPILE)
    check_seed(settings.seed)
    check_seed(settings.split_seed)
    fit_settings(settings)
    with seeded(settings.seed):
        # On stand-in data: sizes are refused before any are read.
        building.build_vae(architecture, (1,), 10)
    if settings.binarize is None:
        bits = settings.likelihood == "bernoulli"
        settings = replace(settings, binarize="dynamic" if bits else "none")
    return _with_absolute_paths(settings)


def build_vae(settings: TrainSettings, dataset: Dataset) -> VAE:
    """Build the VAE that the settings name, ready to be trained on this data set.

    Raises:
        InputError: sizes out of range, or data the likelihood is not defined for.
    """
    vae = building.build_vae(_architecture(settings), dataset.data_shape, len(dataset.train))
    for part in (dataset.train, dataset.validation, dataset.test):
        if len(part):
            vae.check_data(part)
    building.start_at_data(vae, dataset.train)
    return vae


def fit_settings(settings: TrainSettings, num_data: int | None = None) -> FitSettings:
    """Return the options of ``fit`` that the settings stand for, but for device and seed.

    Args:
        settings: what to train on what, and how.
        num_data: training data points, from which a warm-up that was not told follows; None: without
            one.

    Raises:
        InputError: an option out of range.
    """
    return FitSettings(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        objective=objective_of(settings),
        beta=settings.beta,
        warmup_epochs=warmup_epochs(settings, num_data),
        patience=settings.patience,
        schedule=settings.schedule,
        gradient_clip=settings.gradient_clip,
        precision=settings.precision,
        compile=COMPILE[settings.compile],
    )


def warmup_epochs(settings: TrainSettings, num_data: int | None) -> int:
    """Return the warm-up as told; by default one that keeps the latents in use.

    That is a tenth of the run, and in a short one as many epochs as make enough steps, but no more
    than half of it.
    """
    if settings.warmup_epochs is not None or num_data is None:
        return settings.warmup_epochs or 0
    steps_per_epoch = -(-num_data // settings.batch_size)
    enough = -(-_WARMUP_STEPS // steps_per_epoch)
    return max(settings.epochs // 10, min(settings.epochs // 2, enough))


def objective_of(settings: TrainSettings) -> Bound | None:
    """Return the objective that the settings name; None for the plain ELBO.

    Raises:
        InputError: an unknown name, or options out of range or of another objective.
    """
    name, particles, floor = settings.objective, settings.num_particles, settings.free_bits
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, OBJECTIVES)
    check_counts({"num_particles": particles})
    if (floor is not None) != (name == "free-bits"):
        given = "none" if floor is None else floor
        raise InputError(
            f"expected --free-bits with --objective free-bits and only there, got {given} with {name}"
        )
    if name == "iwae":
        return infer.IWAE(particles or _IWAE_PARTICLES)
    if name == "free-bits":
        assert floor is not None
        return infer.FreeBits(floor, num_particles=particles or 1)
    if name == "analytic-kl":
        return infer.AnalyticKL(num_particles=particles or 1)
    if name == "sticking-the-landing":
        return infer.StickingTheLanding(num_particles=particles or 1)
    return None if particles in (None, 1) else infer.TraceBound(num_particles=particles)


def _architecture(settings: TrainSettings) -> Architecture:
    return Architecture(
        prior=settings.prior,
        likelihood=settings.likelihood,
        guide=settings.guide,
        latent_dim=settings.latent_dim,
        hidden=_hidden(settings.hidden),
        activation=settings.activation,
        num_components=settings.num_components,
        sigma=_sigma(settings.sigma),
    )


def check_evaluation(how: EvaluateSettings) -> None:
    """Refuse options of an evaluation that are out of range, before anything is read."""
    if how.method not in METHODS:
        raise unknown_name("method", how.method, METHODS)
    names = ("num_samples", "num_chains", "num_steps", "num_data")
    check_counts({name: getattr(how, name) for name in names})
    check_seed(how.seed)


def check_counts(counts: Mapping[str, int | None]) -> None:
    """Refuse a number below 1, by the name of its option; None is the default."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(
                f"expected --{name.replace('_', '-')} of at least 1, got {value}: leave it out for "
                "the default"
            )


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
