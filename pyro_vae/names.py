"""Names and defaults of the command line; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "LIKELIHOODS",
    "METHODS",
    "PRIORS",
    "EvaluateSettings",
    "TrainSettings",
]

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
ACTIVATIONS = ("relu", "tanh", "gelu", "silu", "elu", "softplus")


@dataclass(frozen=True)
class TrainSettings:
    """Everything ``pyro-vae train`` can be told; the defaults suit the digits."""

    dataset: str = "digits"
    data_root: str | None = None
    download: bool = False
    validation_size: int | None = None
    binarize: str | None = None
    prior: str = "standard-normal"
    num_components: int | None = None
    likelihood: str = "bernoulli"
    sigma: str = "learned"
    guide: str = "mean-field"
    latent_dim: int = 8
    hidden: str = "512,256"
    activation: str = "relu"
    beta: float = 1.0
    warmup_epochs: int | None = None
    epochs: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-3
    patience: int | None = None
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class EvaluateSettings:
    """How ``pyro-vae evaluate`` estimates log p(x)."""

    method: str = "importance"
    num_samples: int = 5000
    target_standard_error: float | None = None
    num_chains: int = 16
    num_steps: int = 1000
    num_data: int | None = None
    seed: int = 0
