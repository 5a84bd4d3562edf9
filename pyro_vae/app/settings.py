"""From settings to a VAE and its training: names looked up, numbers checked, defaults resolved."""

import warnings
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import datasets, guides, likelihoods, networks, priors
from pyro_vae.app import names
from pyro_vae.app.names import EvaluateSettings, TrainSettings
from pyro_vae.data_scale import without_missing
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, available_memory, check_room
from pyro_vae.infer.settings import FitSettings, default_warmup_epochs
from pyro_vae.infer.stock_bound import default_particles, objective_named
from pyro_vae.pair.functions import seeded
from pyro_vae.runs.description import Bounded
from pyro_vae.vae import VAE, ConditionalVAE

_Shape = tuple[int, ...]
# A weight, its gradient and its two moments.
_BYTES_PER_WEIGHT = 16
# Epochs without a better validation ELBO that are waited for at the least.
_PATIENCE = 20


def build_vae(settings: TrainSettings, dataset: Dataset) -> VAE:
    """Build the VAE that the settings name, started at the data set that it is to be trained on."""
    if settings.likelihood == "categorical" and settings.levels is None:
        largest = max(int(part.max()) for part in without_missing(dataset.train))
        settings = replace(settings, levels=max(2, largest + 1))
    classes = None
    if settings.condition is not None:
        conditions = [given[0] for given in dataset.given.values()]
        found = torch.cat(conditions).unique().tolist()
        classes = len(found) if found == list(range(len(found))) else None
        unseen = ~torch.isin(torch.cat(conditions[1:]), conditions[0])
        if classes and unseen.any():
            what = f"{int(unseen.sum())} of {len(unseen)} validation and test data points"
            warnings.warn(f"{what} are of a class that no training datum is of", stacklevel=2)
    vae = assemble_vae(settings, dataset.data_shape, len(dataset.train), classes)
    for part in datasets.PARTS:
        x, *given = dataset.inputs(part)
        if len(x):
            vae.check_observed(x, *given)
    start_vae(vae, settings, *dataset.inputs("train"))
    # What the layers give, for the gradient once more.
    widths = sum(layer.out_features for layer in vae.modules() if isinstance(layer, nn.Linear))
    particles = settings.num_particles or default_particles(settings.objective)
    batch = min(settings.batch_size, len(dataset.train)) * particles
    check_room("training steps", 8 * batch * widths, "lower batch_size, num_particles or the widths")
    return vae


def start_vae(vae: VAE, settings: TrainSettings, *train: Tensor) -> None:
    """Set what training starts from to the training data, which the networks may see standardised."""
    by_default = settings.likelihood in names.REAL
    wanted = by_default if settings.standardize is None else settings.standardize
    (vae.standardize if wanted else vae.start_at_data)(train)


def assemble_vae(
    settings: TrainSettings, data_shape: tuple[int, ...], num_data: int, classes: int | None = None
) -> VAE:
    """Put the VAE that the settings name together, its weights drawn from the global random state."""
    latent_dim = settings.latent_dim
    options = _likelihood_options(settings, data_shape)
    codes = latent_dim - (options.get("size_factor") == "learned")
    if latent_dim == 1 and not codes:
        raise InputError("expected latent_dim of at least 2 with a size factor, one of them, got 1")
    widths = settings.hidden if settings.network == "mlp" else settings.channels
    got = f"widths {widths[:80]} and latent dimension {latent_dim}"
    refusal = f"expected networks that fit in memory, got {got}: make them smaller"
    with Bounded(available_memory() // _BYTES_PER_WEIGHT, refusal):
        size = 0 if settings.condition is None else classes or 1
        encoder, decoder = _networks(settings, data_shape, codes + size)
        if size:
            how = {"activation": settings.activation}
            encoder, decoder = (networks.Conditional(n, size, **how) for n in (encoder, decoder))
        guide = getattr(guides, names.FAMILIES[settings.guide])(encoder, latent_dim)
        prior = _prior(settings, guide, data_shape, num_data)
        likelihood = getattr(likelihoods, names.LIKELIHOODS[settings.likelihood])
        parts = (prior, likelihood(decoder, data_shape, **options), guide)
        return ConditionalVAE(*parts, num_classes=classes) if size else VAE(*parts)


def _networks(settings: TrainSettings, data_shape: _Shape, latent_dim: int) -> tuple[nn.Module, ...]:
    how: dict[str, Any] = {"activation": settings.activation}
    if settings.network == "mlp":
        widths = _widths("hidden widths", settings.hidden)
        log1p = settings.likelihood in names.COUNTS
        encoder = networks.MLPEncoder(data_shape, widths, log1p=log1p, **how)
        return encoder, networks.MLPDecoder(latent_dim, widths[::-1], **how)
    channels = _widths("channels", settings.channels)
    how |= {"norm": "group", "residual_blocks": 2 if settings.network == "resnet" else 0}
    decoder = networks.ConvDecoder(latent_dim, data_shape, channels[::-1], **how)
    return networks.ConvEncoder(data_shape, channels, **how), decoder


def _likelihood_options(settings: TrainSettings, data_shape: tuple[int, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if settings.likelihood in names.WITH_SIGMA:
        options["sigma"] = sigma = settings.sigma or _default_sigma(data_shape)
        with suppress(ValueError):  # else a word, which the likelihood knows or refuses
            options["sigma"] = float(sigma)
    if settings.likelihood in names.LEVELS:
        options[names.LEVELS[settings.likelihood]] = settings.levels or 256
    if settings.likelihood in names.COUNTS and settings.size_factor is not None:
        options["size_factor"] = "learned" if settings.size_factor == "learned" else "observed"
    return options


def _prior(settings: TrainSettings, guide: nn.Module, data_shape: _Shape, num_data: int) -> nn.Module:
    number = settings.num_components or _default_components(settings.prior, num_data)
    if settings.prior == "vamp":
        bounded = settings.likelihood in names.UNIT_INTERVAL
        return priors.VampPrior(guide, data_shape, num_pseudo_inputs=number, unit_interval=bounded)
    if settings.prior == "gaussian-mixture":
        return priors.GaussianMixture(settings.latent_dim, number)
    return getattr(priors, names.PRIORS[settings.prior])(settings.latent_dim)


def _default_components(prior: str, num_data: int) -> int:
    # A tenth of the data keeps a step's cost near that of the batch; 500 is the VampPrior's paper's.
    return max(1, min(500, num_data // 10)) if prior == "vamp" else 10


def _widths(kind: str, text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        wanted = f"{kind} as whole numbers above 0, separated by commas"
        raise InputError(f"expected {wanted}, got {text!r}: e.g. {names.TrainSettings.hidden}")
    return widths


def _default_sigma(data_shape: tuple[int, ...]) -> str:
    # Columns of a table differ in unit and noise; pixels of an image are of one kind.
    return "per-column" if len(data_shape) == 1 else "learned"


def check_settings(settings: TrainSettings) -> TrainSettings:
    """Refuse names and numbers out of range before anything heavy happens.

    What is returned tells the data's binarisation, and where they are found from any other folder.
    """
    names.check_values(settings)
    FitSettings(**fit_options(replace(settings, warmup_epochs=settings.warmup_epochs or 0)))
    with seeded(settings.seed):
        # On stand-in data: sizes are refused before any are read.
        assemble_vae(settings, (1,) if settings.network == "mlp" else (1, 1), 10)
    if settings.binarize is None:
        bits = settings.likelihood == "bernoulli"
        settings = replace(settings, binarize="dynamic" if bits else "none")
    path = Path(settings.dataset)
    if path.suffix in datasets.FILE_TYPES:
        return replace(settings, dataset=str(path.expanduser().absolute()))
    if settings.dataset == "digits":  # comes with scikit-learn
        return settings
    return replace(settings, data_root=str(datasets.root_of(settings.data_root)))


def tell_defaults(settings: TrainSettings, train: Tensor, held_out: Any = ()) -> TrainSettings:
    """Return the settings with the defaults resolved for the data."""
    num_data = len(train)
    told: dict[str, Any] = {"data_seed": settings.split_seed}
    if settings.likelihood in names.WITH_SIGMA:
        told["sigma"] = settings.sigma or _default_sigma(tuple(train.shape[1:]))
    if settings.likelihood in names.REAL:
        told["standardize"] = settings.standardize is not False
        if settings.patience is None and len(held_out):
            # Where sigma is learned too, data learned by heart cost the held-out ones ever more nats.
            told["patience"] = max(_PATIENCE, settings.epochs // 5)
    if settings.num_components is None:
        told["num_components"] = _default_components(settings.prior, num_data)
    if settings.warmup_epochs is None:
        steps = -(-num_data // settings.batch_size)
        told["warmup_epochs"] = default_warmup_epochs(settings.epochs, steps)
    if settings.num_particles is None:
        told["num_particles"] = default_particles(settings.objective)
    return replace(settings, **told)


def as_record(settings: TrainSettings | EvaluateSettings) -> dict[str, Any]:
    """Return settings as they are recorded: defaults resolved, unused ones left out."""
    record = {}
    for each in fields(settings):
        value, condition = getattr(settings, each.name), each.metadata["only_with"]
        idle = condition and getattr(settings, condition.option) not in condition.values
        if value is not None and not idle:
            record[each.name] = value
    return record


def fit_options(settings: TrainSettings) -> dict[str, Any]:
    """Return the options for :func:`pyro_vae.fit`."""
    same = {each.name for each in fields(FitSettings)} & vars(settings).keys() - {"seed"}
    name, floor = settings.objective, settings.free_bits
    if (floor is not None) != (name == "free-bits"):
        told = f"got {'none' if floor is None else floor} with {name}"
        raise InputError(f"expected --free-bits with --objective free-bits and only there, {told}")
    own = {} if floor is None else {"floor": floor}
    objective = objective_named(name, settings.num_particles, **own)
    options = {name: getattr(settings, name) for name in sorted(same)}
    return options | {"objective": objective, "compile": names.COMPILE[settings.compile]}
