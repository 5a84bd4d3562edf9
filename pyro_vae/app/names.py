"""Names and defaults of the command line; imports nothing heavy, so that ``--help`` is quick."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

# Name on the command line -> class name in the module of its kind.
PRIORS = {
    "standard-normal": "StandardNormal",
    "gaussian-mixture": "GaussianMixture",
    "von-mises-fisher": "VonMisesFisher",
    "hypersphere-uniform": "HypersphericalUniform",
    "beta": "Beta",
    "vamp": "VampPrior",
    "flow": "FlowPrior",
}
LIKELIHOODS = {
    "bernoulli": "Bernoulli",
    "gaussian": "Gaussian",
    "continuous-bernoulli": "ContinuousBernoulli",
    "student-t": "StudentT",
    "discretized-logistic": "DiscretizedLogistic",
    "categorical": "Categorical",
    "poisson": "Poisson",
    "negative-binomial": "NegativeBinomial",
}
# Those with a sigma, of values from 0 to 1, of levels, and of counts.
REAL = ("gaussian", "student-t")
WITH_SIGMA = ("gaussian", "student-t", "discretized-logistic")
UNIT_INTERVAL = ("bernoulli", "continuous-bernoulli", "discretized-logistic")
LEVELS = {"discretized-logistic": "levels", "categorical": "num_categories"}
COUNTS = ("poisson", "negative-binomial")
FAMILIES = {
    "mean-field": "MeanFieldNormal",
    "full-rank": "FullRankNormal",
    "iaf": "InverseAutoregressiveFlow",
    "spline": "NeuralSplineFlow",
    "mixture": "MixtureOfNormals",
    "von-mises-fisher": "VonMisesFisher",
    "beta": "Beta",
}
NETWORKS = ("mlp", "conv", "resnet")
METHODS = ("auto", "importance", "annealed", "both")
OBJECTIVES = ("elbo", "analytic-kl", "sticking-the-landing", "free-bits", "iwae")
COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
COMPLETIONS = ("metropolis", "importance", "pseudo-gibbs")
VIEWS = ("scatter", "manifold")
PLANES = ("active", "pca")
ACTIVATIONS = ("relu", "tanh", "gelu", "silu", "elu", "softplus")

# Whole numbers are 1 at least, but for these; and 2**31 - 1 at most (torch keeps some sizes in 32
# bits), but for what NumPy seeds, and what would take memory for nothing.
FROM_ZERO = ("epochs", "warmup_epochs", "validation_size", "seed", "data_seed")
AT_MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "seeds": 1000, "num": 10_000}

# How the help groups the options of a training; all others stand among the rest.
PANELS = {
    "Data": "dataset labels leave_out data_root download validation_size binarize data_seed",
    "Model": "prior num_components likelihood sigma standardize levels size_factor guide latent_dim "
    "network hidden channels activation",
    "Training": "beta warmup_epochs objective num_particles free_bits epochs batch_size "
    "learning_rate schedule patience seed",
    "Advanced": "gradient_clip precision compile device checkpoint_every checkpoint_minutes debug",
}

# What messages for Python advise, and how the command line has it.
SPOKEN = {"the right root": "the right --data-root", "allow the download": "allow it by --download"}

_Value = TypeVar("_Value")


class OnlyWith(NamedTuple):
    """Another option, and those of its values with which an option has an effect."""

    option: str
    values: tuple[str, ...]


def option(
    default: _Value,
    text: str = "",
    only_with: OnlyWith | None = None,
    *,
    flags: str | None = None,
    show_default: bool = True,
    choices: Collection[str] = (),
) -> _Value:
    """Declare a setting that is an option of the command line.

    ``flags`` is how it is written, where that is not its name; ``only_with`` what it needs to have an
    effect; of ``choices`` it is one, and the text names them by default.
    """
    text = text or ", ".join(choices)
    how = {"help": text, "flags": flags, "only_with": only_with, "show_default": show_default}
    return field(default=default, metadata={**how, "choices": choices})


_NAMED = OnlyWith("dataset", ("mnist", "fashion-mnist", "kmnist", "omniglot"))
_SAMPLING = OnlyWith("method", ("auto", "importance", "both"))
_ANNEALING = OnlyWith("method", ("auto", "annealed", "both"))


@dataclass(frozen=True)
class TrainSettings:
    """Everything ``pyro-vae train`` can be told; the defaults suit the digits."""

    dataset: str = option(
        "digits", "digits, mnist, fashion-mnist, kmnist, omniglot, or a .npy/.npz/.csv file."
    )
    labels: str | None = option(None, "Column of a .csv file that holds labels.")
    leave_out: str | None = option(None, "Columns of a .csv file, between commas, that are no data.")
    data_root: str | None = option(None, "Folder of the named sets; default: $PYRO_VAE_DATA.", _NAMED)
    download: bool = option(False, "Download a named set that is missing.", _NAMED)
    validation_size: int | None = option(None, "Data held out of training; default a tenth, 0: none.")
    binarize: str | None = option(
        None,
        "dynamic, static, threshold or none; default: dynamic for bernoulli, else none.",
        choices=("dynamic", "static", "threshold", "none"),
    )
    prior: str = option("standard-normal", choices=PRIORS)
    num_components: int | None = option(
        None,
        "Components of gaussian-mixture (10) or vamp (a tenth of the data).",
        only_with=OnlyWith("prior", ("gaussian-mixture", "vamp")),
    )
    likelihood: str = option("bernoulli", choices=LIKELIHOODS)
    sigma: str | None = option(
        None,
        "Scale of gaussian, student-t or discretized-logistic: a number, learned, per-column or "
        "per-pixel; default: per-column for tables, else learned.",
        only_with=OnlyWith("likelihood", WITH_SIGMA),
    )
    standardize: bool | None = option(
        None,
        "The networks see standardised data (log p(x) is that of the data all the same); default: "
        "they do.",
        flags="--standardize/--no-standardize",
        only_with=OnlyWith("likelihood", REAL),
    )
    levels: int | None = option(
        None,
        "Values that discretized-logistic (256) or categorical (as the data have) tells apart.",
        only_with=OnlyWith("likelihood", tuple(LEVELS)),
    )
    size_factor: str | None = option(
        None,
        "Of counts: learned (one latent is the logarithm of a datum's size); default: none.",
        only_with=OnlyWith("likelihood", COUNTS),
        choices=("learned",),
    )
    guide: str = option("mean-field", choices=FAMILIES)
    latent_dim: int = option(8, "Size of the latent vector.")
    network: str = option("mlp", choices=NETWORKS)
    hidden: str = option(
        "512,256",
        "Widths from the data to the latent side; the decoder mirrors them.",
        only_with=OnlyWith("network", ("mlp",)),
    )
    channels: str = option(
        "32,64",
        "Channels of conv and resnet, likewise; each halves the data's lengths.",
        only_with=OnlyWith("network", ("conv", "resnet")),
    )
    activation: str = option("relu", choices=ACTIVATIONS)
    beta: float = option(1.0, "Weight of the KL term.")
    warmup_epochs: int | None = option(
        None,
        "Epochs over which beta rises from 0; default: a tenth of the epochs, more in short runs.",
    )
    objective: str = option("analytic-kl", choices=OBJECTIVES)
    num_particles: int | None = option(None, "Draws per datum and step; default 1, for iwae 5.")
    free_bits: float | None = option(
        None, "Objective free-bits: nats of each latent dimension that cost nothing."
    )
    epochs: int = option(200, "Passes over the training data.")
    batch_size: int = option(64, "Data per step.")
    learning_rate: float = option(1e-3, "Adam's step size.")
    schedule: str = option("constant", "Of the learning rate: constant, or cosine (down to 0).")
    gradient_clip: float | None = option(None, "Greatest norm of the gradient per datum.")
    precision: str = option("float32", "float32, tf32 or bfloat16.")
    compile: str = option("auto", "auto, on or off: compile the training step.", choices=COMPILE)
    patience: int | None = option(
        None,
        "Stop after so many epochs without a better validation ELBO and keep the best; default: a "
        "fifth of the epochs, 20 at least, for gaussian and student-t, else none.",
    )
    seed: int = option(0, "Seed of initial weights and training.")
    data_seed: int | None = option(None, "Seed of split and bits drawn once; default: the seed.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")

    @property
    def split_seed(self) -> int:
        """Seed of the data's split and of the bits drawn once."""
        return self.seed if self.data_seed is None else self.data_seed


@dataclass(frozen=True)
class EvaluateSettings:
    """How ``pyro-vae evaluate`` estimates log p(x)."""

    method: str = option("auto", choices=METHODS)
    num_samples: int = option(5000, "Importance samples per datum.", _SAMPLING)
    target_standard_error: float | None = option(
        None, "Nats; the samples become a pilot that decides each datum's number.", _SAMPLING
    )
    num_chains: int = option(32, "Annealing: chains per datum.", _ANNEALING)
    num_steps: int = option(1000, "Annealing: steps at most.", _ANNEALING)
    max_annealed: int = option(
        100,
        "Data points to anneal at most; four times as many are looked at from the prior.",
        only_with=OnlyWith("method", ("auto",)),
    )
    num_data: int | None = option(None, "Use only the first N test data points.")
    seed: int = option(0, "Seed of the draws.")


@dataclass(frozen=True)
class RunFiles:
    """Where ``pyro-vae train`` writes a run and its state, or which run it goes on with."""

    output: Path | None = option(None, "Run folder; default: a new one below runs/.")  # noqa: RUF009
    checkpoint_every: int | None = option(None, "Write the run's state every so many epochs.")
    checkpoint_minutes: float = option(1.0, "Write it every so many minutes; 0: every step.")
    resume: Path | None = option(None, "Go on with this interrupted run; it knows all other options.")  # noqa: RUF009


@dataclass(frozen=True)
class EvaluateFiles:
    """What ``pyro-vae evaluate`` reads besides the run, and writes."""

    picture: Path | None = option(None, "Picture of Pareto k per datum and of convergence.")  # noqa: RUF009
    as_json: bool = option(False, "Print one JSON object and nothing else.", flags="--json")
    data_root: str | None = option(None, "Folder of the data set; default: the run's.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class CompareSettings:
    """What ``pyro-vae compare`` combines, names between commas, and how often it trains each."""

    guides: str = option(
        "mean-field,full-rank,iaf,spline,mixture",
        "Variational families between commas, as `train --guide` names them; default: "
        "mean-field, full-rank, iaf, spline and mixture.",
        show_default=False,  # one word too wide for a narrow terminal
    )
    priors: str = option("standard-normal", "Priors between commas.")
    likelihoods: str = option("bernoulli", "Likelihoods between commas.")
    seeds: int = option(3, "Runs of each combination, from --seed on; all see the same data.")
    hold: str | None = option(None, "model: train every guide against the first one's frozen model.")


@dataclass(frozen=True)
class PictureSettings:
    """What every command that draws a picture of a run can be told."""

    output: Path | None = option(None, "Picture file: .png, .svg or .pdf.")  # noqa: RUF009
    data_root: str | None = option(None, "Folder of the data set; default: the run's.")
    seed: int = option(0, "Seed of the draws.")


@dataclass(frozen=True)
class Sample:
    """Draw new data from a run's model into a picture."""

    num: int | None = option(None, "How many; default: 64 images or 1000 vectors.")
    mean: bool | None = option(
        None,
        "Means of the likelihood or draws; default: draws for real vectors, else means.",
        flags="--mean/--draw",
    )


@dataclass(frozen=True)
class Reconstruct:
    """Reconstruct a run's first test data into a picture."""

    num: int | None = option(None, "How many; default: 12 images or 500 vectors.")


@dataclass(frozen=True)
class Complete:
    """Hide a part of a run's first test data and fill it in, into a picture."""

    missing: str = option(
        "right", "lower, upper, left, right (of vectors left, right), or random:SHARE."
    )
    method: str = option(COMPLETIONS[0], choices=COMPLETIONS)
    num: int | None = option(None, "How many; default: 8 images or 200 vectors.")
    num_draws: int = option(6, "Completions of each.")
    num_steps: int = option(
        200,
        "Steps of each chain of metropolis or pseudo-gibbs.",
        only_with=OnlyWith("method", ("metropolis", "pseudo-gibbs")),
    )
    num_samples: int = option(1000, "Samples per datum.", OnlyWith("method", ("importance",)))


@dataclass(frozen=True)
class Latent:
    """Show a run's latent space in a picture: the test data's codes, or the manifold."""

    view: str = option(
        VIEWS[0], "scatter of the codes, or manifold: what a grid decodes to.", choices=VIEWS
    )
    plane: str = option(
        PLANES[0],
        "Axes of the scatter: active (the two most active latents) or pca.",
        only_with=OnlyWith("view", ("scatter",)),
        choices=PLANES,
    )
    num: int | None = option(None, "How many test data; default: 5000.")
    num_steps: int | None = option(
        None,
        "Values per latent of the grid; default: 16, of vectors 40.",
        only_with=OnlyWith("view", ("manifold",)),
    )


@dataclass(frozen=True)
class Traverse:
    """Move one latent of a test datum after the other, into a picture."""

    datum: int = option(1, "Which test datum, from 1.")
    num: int = option(8, "How many latents at most, the most active.")
    num_steps: int = option(11, "Values per latent.")


@dataclass(frozen=True)
class Interpolate:
    """Walk between the codes of a run's first test data, into a picture."""

    num: int = option(6, "How many ways.")
    num_steps: int = option(11, "Points on each way.")


# What is drawn of a run, in the order of the help.
Picture = Sample | Reconstruct | Complete | Latent | Traverse | Interpolate
