"""A VAE as a scikit-learn transformer: latent codes in a pipeline, log p(x) as its score."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Self

import numpy as np
import pyro
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from pyro_vae import tasks
from pyro_vae.app.names import TrainSettings, check_values
from pyro_vae.app.settings import assemble_vae, fit_options, start_vae, tell_defaults
from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.methods import log_marginal
from pyro_vae.infer.training import fit
from pyro_vae.pair.functions import HANDLER_LOCK, resolve_device, seeded
from pyro_vae.vae import VAE


@dataclass(eq=False, repr=False)
class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Variational autoencoder as a scikit-learn transformer.

    Works in a ``Pipeline`` and a ``GridSearchCV``, which maximises :meth:`score`, the mean
    log p(x). Two settings can only be compared by it where the data before them are scaled alike: a
    density depends on the units. Names are those of ``pyro-vae train``.

    Of the checks of scikit-learn's ``check_estimator`` two fail, which score rows in another order or
    alone: a row's score is a Monte Carlo estimate, and its draws come in the order of the rows, so it
    then differs within its error.

    Args:
        latent_dim: size of the latent vector.
        prior: ``standard-normal``, ``gaussian-mixture``, ``von-mises-fisher``,
            ``hypersphere-uniform``, ``beta``, ``vamp`` or ``flow``.
        likelihood: ``gaussian``, ``bernoulli`` (data in [0, 1]) or ``continuous-bernoulli``.
        guide: ``mean-field``, ``full-rank``, ``iaf``, ``spline``, ``mixture``, ``von-mises-fisher``
            or ``beta``.
        hidden: widths of the encoder's layers, or the width of one; the decoder mirrors them.
        activation: name of the activation.
        sigma: the Gaussian likelihood's: a number, ``"learned"``, ``"per-column"`` (the default) or
            ``"per-pixel"``.
        standardize: whether the networks see standardised columns (see
            :meth:`pyro_vae.VAE.standardize`); by default they do under the Gaussian likelihood.
        num_components: components of the prior, where it has any.
        warmup_epochs: epochs over which beta rises from 0; by default a tenth of the epochs, more in
            short runs, as ``pyro-vae train`` has it.
        beta, epochs, batch_size, learning_rate, device: as in :func:`pyro_vae.fit`.
        num_samples: importance samples per datum of the scores.
        seed: seed of initial weights, training and scores.

    Attributes:
        vae_: the trained :class:`pyro_vae.VAE`.
        history_: the curves of :class:`pyro_vae.FitResult`.
        n_features_in_: number of features.
        feature_names_in_: their names, where X had any.

    Example:
        >>> from sklearn.decomposition import PCA
        >>> from sklearn.pipeline import make_pipeline
        >>> pipeline = make_pipeline(PCA(5), VAETransformer(latent_dim=2, epochs=1, hidden=(8,)))
        >>> pipeline.fit_transform(np.random.default_rng(0).normal(size=(50, 10))).shape
        (50, 2)
    """

    # As they came: scikit-learn clones estimators by these attributes. They are checked by fit.
    latent_dim: int = 8
    _: KW_ONLY
    prior: str = "standard-normal"
    likelihood: str = "gaussian"
    guide: str = "mean-field"
    hidden: Sequence[int] | int = (512, 256)
    activation: str = "relu"
    sigma: float | str | None = None
    standardize: bool | None = None
    num_components: int | None = None
    beta: float = 1.0
    warmup_epochs: int | None = None
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    num_samples: int = 500
    seed: int = 0
    device: str = "auto"

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on data ``(N, n_features)``; ``y`` is not used.

        Raises:
            InputError: an option out of range, or data the likelihood is not defined for.

        Warns:
            UserWarning: what went wrong in training (see :class:`pyro_vae.FitResult`).
        """
        check_counts(epochs=self.epochs, least=0)
        # The samples are of the scores, which come after training.
        check_counts(batch_size=self.batch_size, num_samples=self.num_samples)
        x = self._validate(X, reset=True)
        own = self.get_params(deep=False)
        own["hidden"] = ",".join(map(str, np.atleast_1d(self.hidden).tolist()))
        own["sigma"] = None if self.sigma is None else str(self.sigma)
        names = {each.name for each in fields(TrainSettings)}
        settings = TrainSettings(**{name: own[name] for name in names & own.keys()})
        check_values(settings, in_python=True)
        settings = tell_defaults(settings, x)
        with _own_parameters(), seeded(self.seed):
            vae = assemble_vae(settings, tuple(x.shape[1:]), len(x))
            start_vae(vae, settings, x)
            options = fit_options(settings)
            result = fit(vae.model, vae.guide, x, **options, device=self.device, progress=False)
        for text in result.warnings:
            warnings.warn(text, stacklevel=2)
        self.vae_ = vae.eval()
        self.history_ = result.history
        self._n_features_out = self.latent_dim
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return posterior means ``(N, latent_dim)``; for flows, which have none, means of draws."""
        vae, x = self._place(), self._validate(X, reset=False)
        with _own_parameters(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the mean of latent 'z' has no closed form")
            z = tasks.encode(vae.guide, x, seed=self.seed)
        return z.cpu().numpy()

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Return the likelihood's means ``(N, n_features)`` for latents ``(N, latent_dim)``.

        On a sphere, where a posterior mean lies inside, its direction is decoded.
        """
        vae = self._place()
        z = torch.from_numpy(check_array(X, dtype=np.float32))
        if z.shape[1] != self._n_features_out:
            count = self._n_features_out
            raise InputError(f"expected latents of {count} coordinates, got {z.shape[1]}")
        assert isinstance(self.n_features_in_, int)
        if getattr(vae.prior, "latent_support", None) == "unit sphere":
            z = torch.nn.functional.normalize(z, dim=-1)
        with _own_parameters():
            x = tasks.decode(vae.model, z, z.new_zeros(len(z), self.n_features_in_))
        return x.cpu().numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        """Return log p(x) of each datum in nats, ``(N,)``, by importance sampling.

        Warns:
            UserWarning: data whose importance weights can't be trusted.
        """
        vae, x = self._place(), self._validate(X, reset=False)
        with _own_parameters():
            how: Any = {"num_samples": self.num_samples, "keep_draws": 0, "seed": self.seed}
            estimate = log_marginal(vae.model, vae.guide, x, **how)
        return estimate.log_prob.numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log p(x) in nats; ``y`` is not used."""
        return float(self.score_samples(X).mean())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self, "vae_"):
            self.vae_.cpu()  # to be loaded where there is no accelerator; it is placed when used
        return dict(super().__getstate__())

    def _validate(self, X: Any, *, reset: bool) -> Tensor:
        values = validate_data(self, X, dtype=np.float32, reset=reset)
        return torch.from_numpy(np.array(values, order="C"))

    def _place(self) -> VAE:
        """Return the trained VAE where it is to compute."""
        check_is_fitted(self)
        return self.vae_.to(resolve_device(self.device))


@contextmanager
def _own_parameters() -> Iterator[None]:
    """Leave Pyro's parameter store as it was: an estimator is no part of the user's program."""
    with HANDLER_LOCK, pyro.get_param_store().scope():
        yield
