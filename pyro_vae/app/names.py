"""Names and defaults of the command line; imports nothing heavy, so that ``--help`` is quick."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pyro_vae.errors import unknown_name, whole_number

# Name on the command line -> class name in the module of its kind.
PRIORS = {
    "standard-normal": "StandardNormal", "gaussian-mixture": "GaussianMixture",
    "von-mises-fisher": "VonMisesFisher", "hypersphere-uniform": "HypersphericalUniform",
    "beta": "Beta", "vamp": "VampPrior", "flow": "FlowPrior",
}  # fmt: skip
LIKELIHOODS = {
    "bernoulli": "Bernoulli", "gaussian": "Gaussian", "continuous-bernoulli": "ContinuousBernoulli",
    "student-t": "StudentT", "discretized-logistic": "DiscretizedLogistic",
    "categorical": "Categorical", "poisson": "Poisson", "negative-binomial": "NegativeBinomial",
}  # fmt: skip
# Those with a sigma, of values from 0 to 1, of levels, and of counts.
REAL = ("gaussian", "student-t")
WITH_SIGMA = ("gaussian", "student-t", "discretized-logistic")
UNIT_INTERVAL = ("bernoulli", "continuous-bernoulli", "discretized-logistic")
LEVELS = {"discretized-logistic": "levels", "categorical": "num_categories"}
COUNTS = ("poisson", "negative-binomial")
FAMILIES = {
    "mean-field": "MeanFieldNormal", "full-rank": "FullRankNormal",
    "iaf": "InverseAutoregressiveFlow", "spline": "NeuralSplineFlow", "mixture": "MixtureOfNormals",
    "von-mises-fisher": "VonMisesFisher", "beta": "Beta",
}  # fmt: skip
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
    "Data": "dataset labels leave_out missing data_root download validation_size binarize data_seed",
    "Model": "prior num_components likelihood sigma standardize levels size_factor condition guide "
    "latent_dim network hidden channels activation",
    "Training": "beta warmup_epochs objective num_particles free_bits epochs batch_size "
    "learning_rate schedule patience seed",
    "Advanced": "gradient_clip precision compile device checkpoint_every checkpoint_minutes debug",
}

# What messages for Python advise, and how the command line has it.
SPOKEN = {
    "the right root": "the right --data-root",
    "allow the download": "allow it by --download",
    "allow_missing=True": "--missing nan",
    "leave_out=": "--leave-out",
    "labels=": "--labels",
}

_Value = TypeVar("_Value")


class OnlyWith(NamedTuple):
    """Another option, and those of its values with which an option has an effect."""

    option: str
    values: tuple[str, ...]


def option(
    default: _Value, text: str = "", only_with: OnlyWith | None = None, *, flags: str | None = None,
    show_default: bool = True, choices: Collection[str] = (),
) -> _Value:  # fmt: skip
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
_COMPONENTS = OnlyWith("prior", ("gaussian-mixture", "vamp"))
_DENSE = OnlyWith("network", ("mlp",))
_GRID = OnlyWith("view", ("manifold",))
_CHAINS = OnlyWith("method", ("metropolis", "pseudo-gibbs"))


@dataclass(frozen=True)
class TrainSettings:
    """The options of ``pyro-vae train``; the defaults suit the digits."""

    dataset: str = option(
        "digits", "digits, mnist, fashion-mnist, kmnist, omniglot, or a .npy/.npz/.csv file."
    )
    labels: str | None = option(None, "Column of a .csv file that holds labels.")
    leave_out: str | None = option(None, "Columns of a .csv file to ignore, separated by commas.")
    missing: str | None = option(None, "nan: NaN stands for a missing value.", choices=("nan",))
    data_root: str | None = option(None, "Folder of the named sets; default: $PYRO_VAE_DATA.", _NAMED)
    download: bool = option(False, "Download a named set that is missing.", _NAMED)
    validation_size: int | None = option(None, "Size of the validation part; default: a tenth.")
    binarize: str | None = option(
        None,
        "dynamic, static, threshold or none; default: dynamic for bernoulli, else none.",
        choices=("dynamic", "static", "threshold", "none"),
    )
    prior: str = option("standard-normal", choices=PRIORS)
    num_components: int | None = option(
        None, "Components of gaussian-mixture (10) or vamp (a tenth of the data).", _COMPONENTS
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
        "Standardise what the networks see; log p(x) stays that of the data as given; default: yes.",
        flags="--standardize/--no-standardize",
        only_with=OnlyWith("likelihood", REAL),
    )
    levels: int | None = option(
        None,
        "Number of values of discretized-logistic (256) or categorical (as many as in the data).",
        only_with=OnlyWith("likelihood", tuple(LEVELS)),
    )
    size_factor: str | None = option(
        None,
        "For counts: learned (one latent is its log), or a column or an array; default: none.",
        only_with=OnlyWith("likelihood", COUNTS),
    )
    condition: str | None = option(None, "Given to the networks: labels, a column or an array.")
    guide: str = option("mean-field", choices=FAMILIES)
    latent_dim: int = option(8, "Size of the latent vector.")
    network: str = option("mlp", choices=NETWORKS)
    hidden: str = option(
        "512,256", "Widths of the encoder's layers; the decoder mirrors them.", _DENSE
    )
    channels: str = option(
        "32,64",
        "Channels of conv and resnet, mirrored too; each stage halves length or height and width.",
        only_with=OnlyWith("network", ("conv", "resnet")),
    )
    activation: str = option("relu", choices=ACTIVATIONS)
    beta: float = option(1.0, "Weight of the KL term.")
    warmup_epochs: int | None = option(
        None,
        "Epochs over which beta rises from 0; default: a tenth of the epochs, more in short runs.",
    )
    objective: str = option("analytic-kl", choices=OBJECTIVES)
    num_particles: int | None = option(None, "Draws per data point and step; default: 1, for iwae 5.")
    free_bits: float | None = option(
        None, "With --objective free-bits: free nats of each latent dimension."
    )
    epochs: int = option(200, "Passes over the training data.")
    batch_size: int = option(64, "Data points per step.")
    learning_rate: float = option(1e-3, "Adam's step size.")
    schedule: str = option("constant", "Learning rate: constant, or cosine (down to 0).")
    gradient_clip: float | None = option(None, "Clip the gradient (per data point) to this norm.")
    precision: str = option("float32", "float32, tf32 or bfloat16.")
    compile: str = option("auto", "auto, on or off: compile the training step.", choices=COMPILE)
    patience: int | None = option(
        None,
        "Stop after this many epochs without improvement of the validation ELBO, and keep the best; "
        "default for gaussian and student-t: a fifth of the epochs, at least 20; else none.",
    )
    seed: int = option(0, "Seed of the initial weights and of training.")
    data_seed: int | None = option(None, "Seed of the split and of fixed bits; default: --seed.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")

    @property
    def split_seed(self) -> int:
        """Seed of the data's split and of the bits drawn once."""
        return self.seed if self.data_seed is None else self.data_seed


@dataclass(frozen=True)
class EvaluateSettings:
    """How ``pyro-vae evaluate`` estimates log p(x)."""

    method: str = option("auto", choices=METHODS)
    num_samples: int = option(5000, "Importance samples per data point.", _SAMPLING)
    target_standard_error: float | None = option(
        None, "Nats; the samples become a pilot that says how many each datum needs.", _SAMPLING
    )
    num_chains: int = option(32, "Annealing: chains per data point.", _ANNEALING)
    num_steps: int = option(1000, "Annealing: maximum steps of a chain.", _ANNEALING)
    max_annealed: int = option(
        100,
        "Maximum of data points to anneal; up to four times as many are checked from the prior.",
        only_with=OnlyWith("method", ("auto",)),
    )
    num_data: int | None = option(None, "Use only the first N test data points.")
    seed: int = option(0, "Seed of the draws.")


@dataclass(frozen=True)
class RunFiles:
    """Where ``pyro-vae train`` writes a run and its state, or which run it resumes."""

    output: Path | None = option(None, "Run folder; default: a new one below runs/.")  # noqa: RUF009
    checkpoint_every: int | None = option(None, "Write a checkpoint every N epochs.")
    checkpoint_minutes: float = option(1.0, "Write a checkpoint every N minutes; 0: at every step.")
    resume: Path | None = option(None, "Resume the run in this folder, with its own options.")  # noqa: RUF009


@dataclass(frozen=True)
class EvaluateFiles:
    """What ``pyro-vae evaluate`` reads besides the run, and writes."""

    picture: Path | None = option(  # noqa: RUF009
        None, "Picture of Pareto k and of how the estimate converges, to this file."
    )
    as_json: bool = option(False, "Print one JSON object and nothing else.", flags="--json")
    data_root: str | None = option(None, "Folder of the data set; default: the run's.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class CompareSettings:
    """What ``pyro-vae compare`` combines, names separated by commas, and how often it trains it."""

    guides: str = option(
        "mean-field,full-rank,iaf,spline,mixture",
        "Variational families of `train --guide`, separated by commas; default: "
        "mean-field, full-rank, iaf, spline and mixture.",
        show_default=False,  # one word too wide for a narrow terminal
    )
    priors: str = option("standard-normal", "Priors, separated by commas.")
    likelihoods: str = option("bernoulli", "Likelihoods, separated by commas.")
    seeds: int = option(3, "Runs of each combination, seeds from --seed up; all see the same data.")
    hold: str | None = option(None, "model: train every guide on the frozen model of the first.")


@dataclass(frozen=True)
class PictureSettings:
    """The options of every command that draws a picture of a run."""

    output: Path | None = option(None, "Picture file: .png, .svg or .pdf.")  # noqa: RUF009
    condition: str | None = option(None, "Draw for this class or number, with its test data.")
    data_root: str | None = option(None, "Folder of the data set; default: the run's.")
    seed: int = option(0, "Seed of the draws.")


@dataclass(frozen=True)
class Sample:
    """Draw new data from a run's model into a picture."""

    num: int | None = option(None, "How many to draw; default: 64 images or 1000 vectors.")
    mean: bool | None = option(
        None,
        "Means of the likelihood or draws; default: draws for real vectors, else means.",
        flags="--mean/--draw",
    )


@dataclass(frozen=True)
class Reconstruct:
    """Draw the first test data points of a run beside their reconstructions."""

    num: int | None = option(None, "How many; default: 12 images or 500 vectors.")


@dataclass(frozen=True)
class Complete:
    """Hide a part of a run's first test data points, fill it in, and draw the result."""

    missing: str = option(
        "right", "lower, upper, left, right (for vectors left, right), random:SHARE, or nan: no more."
    )
    method: str = option(COMPLETIONS[0], choices=COMPLETIONS)
    num: int | None = option(None, "How many; default: 8 images or 200 vectors.")
    num_draws: int = option(6, "Completions of each data point.")
    num_steps: int = option(200, "Steps of each chain of metropolis or pseudo-gibbs.", _CHAINS)
    num_samples: int = option(1000, "Samples per data point.", OnlyWith("method", ("importance",)))


@dataclass(frozen=True)
class Latent:
    """Draw a run's latent space: the codes of the test data, or the manifold."""

    view: str = option(
        VIEWS[0], "scatter of the codes, or manifold: what a grid decodes to.", choices=VIEWS
    )
    plane: str = option(
        PLANES[0],
        "Axes of the scatter: active (the two most active latents) or pca.",
        only_with=OnlyWith("view", ("scatter",)),
        choices=PLANES,
    )
    num: int | None = option(None, "Number of test data points; default: 5000.")
    num_steps: int | None = option(
        None, "Values per latent of the grid; default: 16, for vectors 40.", _GRID
    )


@dataclass(frozen=True)
class Traverse:
    """Vary the latents of a test data point one at a time, and draw what they decode to."""

    datum: int = option(1, "Number of the test data point, from 1.")
    num: int = option(8, "Maximum number of latents to vary, the most active first.")
    num_steps: int = option(11, "Values per latent.")


@dataclass(frozen=True)
class Interpolate:
    """Walk between the codes of a run's first test data points, and draw the way."""

    num: int = option(6, "Number of paths.")
    num_steps: int = option(11, "Number of points on each path.")


# What is drawn of a run, in the order of the help.
Picture = Sample | Reconstruct | Complete | Latent | Traverse | Interpolate


def check_values(settings: Any, *, in_python: bool = False) -> None:
    """Refuse unknown names, and whole numbers out of range, by the option or argument."""
    for each in fields(settings):
        name, value, choices = each.name, getattr(settings, each.name), each.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise unknown_name(name.replace("_", " "), value, choices)
        if isinstance(value, int) and not isinstance(value, bool):
            least, most = int(name not in FROM_ZERO), AT_MOST.get(name, 2**31 - 1)
            whole_number(name if in_python else flag(name), value, least=least, most=most)


def flag(name: str) -> str:
    """Return the option of a setting as it is written on the command line."""
    return f"--{name.replace('_', '-')}"
