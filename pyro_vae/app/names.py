"""Names and defaults of the command line; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

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
}
FAMILIES = {
    "mean-field": "MeanFieldNormal",
    "full-rank": "FullRankNormal",
    "iaf": "InverseAutoregressiveFlow",
    "spline": "NeuralSplineFlow",
    "mixture": "MixtureOfNormals",
    "von-mises-fisher": "VonMisesFisher",
    "beta": "Beta",
}
METHODS = ("importance", "annealed", "both")
OBJECTIVES = ("elbo", "analytic-kl", "sticking-the-landing", "free-bits", "iwae")
COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
COMPLETIONS = ("metropolis", "importance", "pseudo-gibbs")
VIEWS = ("scatter", "manifold")
PLANES = ("active", "pca")
ACTIVATIONS = ("relu", "tanh", "gelu", "silu", "elu", "softplus")

_Value = TypeVar("_Value")


def option(default: _Value, text: str) -> _Value:
    """Declare a setting that is an option of the command line, with its default and help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainSettings:
    """Everything ``pyro-vae train`` can be told; the defaults suit the digits."""

    dataset: str = option(
        "digits", "digits, mnist, fashion-mnist, kmnist, omniglot, or a .npy/.npz file."
    )
    data_root: str | None = option(None, "Folder of the named sets; default: $PYRO_VAE_DATA.")
    download: bool = option(False, "Download a named set that is missing.")
    validation_size: int | None = option(
        None, "Data held out of training; default a tenth, 0 = none."
    )
    binarize: str | None = option(
        None, "dynamic, static, threshold or none; default: dynamic for bernoulli, else none."
    )
    prior: str = option("standard-normal", ", ".join(PRIORS))
    num_components: int | None = option(
        None, "Components of gaussian-mixture (10) or vamp (a tenth of the data)."
    )
    likelihood: str = option("bernoulli", ", ".join(LIKELIHOODS))
    sigma: str = option("learned", "Gaussian likelihood: a number, learned, or per-pixel.")
    guide: str = option("mean-field", ", ".join(FAMILIES))
    latent_dim: int = option(8, "Size of the latent vector.")
    hidden: str = option(
        "512,256", "Widths from the data to the latent side; the decoder mirrors them."
    )
    activation: str = option("relu", ", ".join(ACTIVATIONS))
    beta: float = option(1.0, "Weight of the KL term.")
    warmup_epochs: int | None = option(
        None,
        "Epochs over which beta rises from 0; default: a tenth of the epochs, more in short runs.",
    )
    objective: str = option("elbo", ", ".join(OBJECTIVES))
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
    compile: str = option("auto", "auto, on or off: compile the training step.")
    patience: int | None = option(None, "Stop after so many epochs without a better validation ELBO.")
    seed: int = option(0, "Seed of initial weights and training.")
    data_seed: int | None = option(
        None, "Seed of the split and of the bits drawn once; default: the seed."
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")

    @property
    def split_seed(self) -> int:
        """Seed of the data's split and of the bits drawn once."""
        return self.seed if self.data_seed is None else self.data_seed


@dataclass(frozen=True)
class EvaluateSettings:
    """How ``pyro-vae evaluate`` estimates log p(x)."""

    method: str = option("importance", ", ".join(METHODS))
    num_samples: int = option(5000, "Importance samples per datum.")
    target_standard_error: float | None = option(
        None, "Nats; the samples become a pilot that decides each datum's number."
    )
    num_chains: int = option(16, "Annealing: chains per datum.")
    num_steps: int = option(1000, "Annealing: steps.")
    num_data: int | None = option(None, "Only the first so many test data.")
    seed: int = option(0, "Seed of the draws.")
