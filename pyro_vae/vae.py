"""The VAE: a prior, a likelihood and a variational family as the two Pyro functions of a pair."""

import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae import guides
from pyro_vae.data_scale import location_and_scale, moments, without_missing
from pyro_vae.errors import InputError, size
from pyro_vae.networks import Conditional, Standardized

Component = Callable[..., dist.Distribution]
_numbers = itertools.count()


class VAE(nn.Module):
    """Variational autoencoder: ``vae.model`` and ``vae.guide`` are a Pyro pair like any other.

    Args:
        prior: p(z), a callable without arguments; see :class:`pyro_vae.priors.Prior`.
        likelihood: p(x given z), a callable of z; see :class:`pyro_vae.likelihoods.Likelihood`.
        guide: q(z given x), a callable of x; see :class:`pyro_vae.guides.VariationalFamily`.

    Components that are plain functions must hold nothing to train: their parameters would be unknown
    to Pyro (:func:`pyro_vae.fit` refuses them).

    Raises:
        InputError: components whose latents differ in support or size; at the first use, a prior
            that is not one distribution over the latents.

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes"; Rezende, Mohamed, Wierstra 2014.

    Example:
        >>> import torch, pyro_vae as pv
        >>> encoder, decoder = pv.networks.MLPEncoder((6,)), pv.networks.MLPDecoder(2)
        >>> vae = pv.VAE(
        ...     pv.priors.StandardNormal(2),
        ...     pv.likelihoods.Bernoulli(decoder, (6,)),
        ...     pv.guides.MeanFieldNormal(encoder, 2),
        ... )
        >>> pv.log_weights(vae.model, vae.guide, torch.ones(3, 6), num_samples=5).shape
        torch.Size([5, 3])
    """

    def __init__(self, prior: Component, likelihood: Component, guide: Component) -> None:
        super().__init__()
        _check_components(prior, likelihood, guide)
        self.prior, self.likelihood, self.variational_family = prior, likelihood, guide
        self.name = f"vae_{next(_numbers)}"

    @property
    def family(self) -> Callable[..., dist.Distribution]:
        """The variational family: what was passed as ``guide``, under its short name."""
        return self.variational_family

    def model(self, x: Tensor, *given: Tensor) -> None:
        """Draw z from the prior and score x ``(N, *data_shape)`` under the likelihood.

        ``given``: the size factors ``(N,)`` of counts, where the likelihood takes them.
        """
        self._register("prior")
        self._register("likelihood")
        with pyro.plate("data", len(x)), _made_beside(x):
            z = pyro.sample("z", self._prior())
            pyro.sample("x", self.likelihood(z, *given), obs=x)

    def guide(self, x: Tensor, *given: Tensor) -> None:
        """Draw z from q(z given x) for x ``(N, *data_shape)``; further inputs are for the model."""
        self._register("variational_family")
        with pyro.plate("data", len(x)), _made_beside(x):
            pyro.sample("z", self.variational_family(*self.family_inputs(x, *given)))

    def family_inputs(self, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs that q depends on: x alone."""
        return (x,)

    def check_data(self, x: Tensor, *given: Tensor) -> None:
        """Refuse data the likelihood is not defined for (see ``Likelihood.check``)."""
        if self._takes_sizes and not (given[-1].dim() == 1 and bool((given[-1] > 0).all())):
            wanted = "size factors as numbers above 0, one for each datum"
            got = f"shape {tuple(given[-1].shape)} and values from {given[-1].min():g}"
            raise InputError(f"expected {wanted}, got {got}: correct them")
        if hasattr(self.likelihood, "check"):
            self.likelihood.check(x)

    def start_at_data(self, x: Tensor | tuple[Tensor, ...]) -> None:
        """Set what training starts from to the data, before :func:`pyro_vae.fit`.

        The decoder's first mean becomes the data's, so that the latents are not spent on it (see
        :meth:`pyro_vae.likelihoods.Likelihood.start_at_mean`), and a Gaussian's learned sigma their
        deviation; the pseudo-inputs of a VampPrior are drawn around the data. ``pyro-vae train`` and
        :class:`pyro_vae.VAETransformer` start so. Call it again and it starts again.

        Training data are ``(N, *data_shape)``, a tensor or an array, or a tuple with all that the
        model is given; NaN, where values are missing, is left out.

        Raises:
            InputError: data of another shape or that the likelihood is not defined for, or a
                likelihood that has no first mean to set.

        Example:
            >>> import torch, pyro_vae as pv
            >>> likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2), (2,))
            >>> guide = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((2,)), 2)
            >>> vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)
            >>> vae.start_at_data(torch.tensor([[0.0, 1.0], [0.5, 1.0]]))
            >>> likelihood.logits.map.bias.sigmoid()  # logits that keep away from 0 and 1
            tensor([0.2500, 0.9990], grad_fn=<SigmoidBackward0>)
        """
        x, *given = map(_training_data, x if isinstance(x, tuple) else (x,))
        self.check_observed(x, *given)
        self._start_at(x, *given)

    def standardize(self, x: Tensor | tuple[Tensor, ...]) -> None:
        """Let the networks see standardised data, in place of :meth:`start_at_data`.

        The encoder is given ``(x - loc) / scale`` and the likelihood's output is mapped back, so that
        data in any units are trained as well as standardised ones. Both numbers are buffers of the
        components, saved with them. Everything that goes in and comes out, ``log p(x)`` too, stays in
        the data's own units. The scale is one for images and sequences and each column's own for
        tables ``(N, columns)``, 1 for a column that does not vary. Then training starts at the data.

        Training data are as :meth:`start_at_data` takes them.

        Raises:
            InputError: data of another shape; a likelihood without such a map, such as one of values
                in [0, 1]; a family that has no encoder.

        Example:
            >>> import torch, pyro_vae as pv
            >>> likelihood = pv.likelihoods.Gaussian(pv.networks.MLPDecoder(2), (2,), sigma="learned")
            >>> guide = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((2,)), 2)
            >>> vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)
            >>> vae.standardize(torch.tensor([[1000.0, 0.0], [3000.0, 0.0]]))
            >>> likelihood.scale
            tensor([1000.,    1.])
        """
        x, *given = map(_training_data, x if isinstance(x, tuple) else (x,))
        family, likelihood = self.variational_family, self.likelihood
        encoder = getattr(family, "encoder", None)
        if not hasattr(likelihood, "standardize") or not isinstance(encoder, nn.Module):
            raise InputError(
                "expected a likelihood with a method standardize and a family with an encoder, got "
                f"{type(likelihood).__name__} and {type(family).__name__}: give the pair (x - mean) "
                "/ deviation, and subtract the sum of log(deviation) over a datum from its log p(x)"
            )
        self.check_observed(x, *given)
        loc, scale = location_and_scale(x)
        likelihood.standardize(loc, scale)
        if not isinstance(encoder, Standardized):
            family.encoder = encoder = Standardized(encoder, loc.shape)  # type: ignore[attr-defined]
        encoder.to(next(self.parameters(), loc)).loc.copy_(loc)
        encoder.scale.copy_(scale)
        self._start_at(x, *given)

    def check_observed(self, x: Tensor, *given: Tensor) -> None:
        """Refuse what :meth:`check_data` refuses, except NaN, where values are missing."""
        for block in without_missing(x):
            self.check_data(block, *given)

    def _start_at(self, x: Tensor, *given: Tensor) -> None:
        mean = moments(x)[0].to(x) if x.amin().isnan() else x.mean(0)
        # Of counts, what their mean is with a size factor of 1.
        mean = mean / (given[-1].mean() if self._takes_sizes else 1)
        try:
            if not hasattr(self.likelihood, "start_at_mean"):
                raise NotImplementedError
            self.likelihood.start_at_mean(mean)
        except NotImplementedError:  # a likelihood of the user's own may leave it out
            raise InputError(
                "expected a likelihood with a first mean to set, got "
                f"{type(self.likelihood).__name__}: give it start_at_mean (see "
                "pyro_vae.likelihoods.Likelihood), or train without start_at_data"
            ) from None
        if hasattr(self.likelihood, "start_sigma"):
            self.likelihood.start_sigma(x)
        if hasattr(self.prior, "start_at_data"):
            self.prior.start_at_data(x)

    @property
    def num_inputs(self) -> int:
        """How many tensors model and guide take, x included."""
        return 1 + self._takes_sizes

    @property
    def _takes_sizes(self) -> bool:
        return getattr(self.likelihood, "takes_sizes", False)

    def _prior(self) -> dist.Distribution:
        prior = self.prior()
        if prior.batch_shape:
            batch, event = tuple(prior.batch_shape), tuple(prior.event_shape)
            advice = "leave the leading dimensions out" if event else f"add .to_event({len(batch)})"
            got = f"batch shape {batch} and event shape {event}"
            raise InputError(f"expected a prior with batch shape (), got {got}: {advice}")
        return prior

    def _register(self, part: str) -> None:
        component = getattr(self, part)
        # One that is frozen as a whole has nothing for Pyro to know, and is no reason to warn.
        if isinstance(component, nn.Module) and any(p.requires_grad for p in component.parameters()):
            pyro.module(f"{self.name}.{part}", component)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's store leaves a weak reference on each parameter, which can't be pickled. Who reads
        # the parameter there next gets another one.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return dict(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy (copy.deepcopy goes through here) is another VAE: under the same name Pyro would keep
        # training the original's parameters.
        super().__setstate__(state)
        self.name = f"vae_{next(_numbers)}"


def _made_beside(x: Tensor) -> AbstractContextManager[Any]:
    """Let a component's ``torch.zeros(8)`` be made on the device of the data."""
    return nullcontext() if x.device.type == "cpu" else x.device


class ConditionalVAE(VAE):
    """A VAE whose data come with a condition c: p(z given c), p(x given z, c) and q(z given x, c).

    ``model(x, c)`` and ``guide(x, c)`` are a pair of data ``(x, c)``, in :func:`pyro_vae.fit`,
    :func:`pyro_vae.log_marginal` and the tasks; ``tasks.generate(vae.model, (like, c))`` draws under
    given conditions.

    Args:
        prior: p(z), as in :class:`VAE`, or p(z given c): a callable of c, such as a family,
            ``MeanFieldNormal(MLPEncoder((condition_dim,)), latent_dim)``.
        likelihood, guide: as in :class:`VAE`, called with c too; the package's own hand c on to
            their network, see :class:`pyro_vae.networks.Conditional`.
        num_classes: conditions are labels 0 to num_classes - 1, ``(N,)``, which components get as
            vectors with a single 1; None: they are covariates ``(N, condition_dim)`` or ``(N,)``,
            of which :class:`pyro_vae.networks.Conditional` keeps the scale that they start with.

    Raises:
        InputError: as of :class:`VAE`; a VampPrior, whose pseudo-inputs have no condition; conditions
            that are no such labels, or not finite.

    Source:
        Sohn, Lee, Yan 2015, "Learning Structured Output Representation using Deep Conditional
        Generative Models".

    Example:
        >>> import torch, pyro_vae as pv
        >>> encoder = pv.networks.Conditional(pv.networks.MLPEncoder((6,)), 3)
        >>> decoder = pv.networks.Conditional(pv.networks.MLPDecoder(2 + 3), 3)
        >>> likelihood = pv.likelihoods.Bernoulli(decoder, (6,))
        >>> guide = pv.guides.MeanFieldNormal(encoder, 2)
        >>> vae = pv.ConditionalVAE(pv.priors.StandardNormal(2), likelihood, guide, num_classes=3)
        >>> pv.tasks.generate(vae.model, (torch.zeros(4, 6), torch.tensor([0, 1, 2, 2]))).shape
        torch.Size([4, 6])
    """

    def __init__(
        self, prior: Component, likelihood: Component, guide: Component, *,
        num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(prior, likelihood, guide)
        self.num_classes = None if num_classes is None else size("num_classes", num_classes)
        call = prior.forward if isinstance(prior, nn.Module) else prior
        self.has_conditional_prior = bool(inspect.signature(call).parameters)
        if hasattr(prior, "guide") and not self.has_conditional_prior:
            kind = type(prior).__name__
            raise InputError(f"expected a prior without pseudo-inputs, got {kind}: use another one")

    @property
    def num_inputs(self) -> int:
        """How many tensors model and guide take, x and c included."""
        return 1 + super().num_inputs

    def model(self, x: Tensor, condition: Tensor, *given: Tensor) -> None:  # type: ignore[override]
        """Draw z given the condition and score x ``(N, *data_shape)`` under the likelihood."""
        self._register("prior")
        self._register("likelihood")
        c = self.as_vectors(condition)
        with pyro.plate("data", len(x)), _made_beside(x):
            z = pyro.sample("z", self.prior(c) if self.has_conditional_prior else self._prior())
            pyro.sample("x", self.likelihood(z, c, *given), obs=x)

    def guide(self, x: Tensor, condition: Tensor, *given: Tensor) -> None:  # type: ignore[override]
        """Draw z from q(z given x, c)."""
        super().guide(x, condition, *given)

    def family_inputs(self, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs that q depends on: x and the condition."""
        return x, self.as_vectors(given[0])

    def _start_at(self, x: Tensor, *given: Tensor) -> None:
        super()._start_at(x, *given)
        if self.num_classes is None:
            scale = location_and_scale(self.as_vectors(given[0]))
            for network in self.modules():
                if isinstance(network, Conditional):
                    network.loc.copy_(scale[0])
                    network.scale.copy_(scale[1])

    def as_vectors(self, condition: Tensor) -> Tensor:
        """Return conditions as components get them, ``(N, condition_dim)``."""
        if self.num_classes is None:
            return condition.unsqueeze(-1) if condition.dim() == 1 else condition
        kind = condition.dtype if condition.is_floating_point() else torch.get_default_dtype()
        classes = torch.arange(self.num_classes, device=condition.device)
        return (condition.unsqueeze(-1) == classes).to(kind)

    def check_data(self, x: Tensor, *given: Tensor) -> None:
        """Refuse data the likelihood is not defined for, and anything but conditions."""
        condition, *sizes = given
        fits = bool(condition.isfinite().all()) and condition.dim() in (1, 2)
        wanted = "conditions as finite numbers (N,) or (N, condition_dim)"
        if self.num_classes is not None:
            wanted = f"labels (N,) from 0 to {self.num_classes - 1} as conditions"
            fits = condition.dim() == 1 and bool((self.as_vectors(condition).sum(-1) == 1).all())
        if not fits:
            raise InputError(
                f"expected {wanted}, got shape {tuple(condition.shape)} and values from "
                f"{condition.min():g} to {condition.max():g}: pass (x, conditions)"
            )
        super().check_data(x, *sizes)


def _training_data(x: Any) -> Tensor:
    """Return data as floating-point numbers, of which there is a mean."""
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        wanted, advice = "training data as a tensor or an array", "for a Dataset pass data.train"
        raise InputError(f"expected {wanted}, got {type(x).__name__}: {advice}") from None
    if x.ndim == 0 or not len(x):
        raise InputError(f"expected at least one datum to start at, got shape {tuple(x.shape)}")
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _check_components(prior: object, likelihood: object, guide: object) -> None:
    """Refuse anything but components, and latents that differ by what the components say."""
    for part, given in (("prior", prior), ("likelihood", likelihood), ("guide", guide)):
        if isinstance(given, Distribution):  # Pyro's are callable: they draw
            arguments = {"prior": "", "likelihood": " z", "guide": " x"}[part]
            what = f"{part} as a function that returns a distribution"
            found_ = f"a {type(given).__name__} itself: pass lambda{arguments}"
            raise InputError(f"expected {what}, got {found_}: distribution")
    wanted, got = getattr(prior, "latent_support", None), getattr(guide, "latent_support", None)
    if wanted is not None and got is not None and wanted != got:
        names = sorted(set(guides.__all__) - {"VariationalFamily"})
        matching = [name for name in names if getattr(guides, name).latent_support == wanted]
        what = f"a family with latents on the {wanted} for {type(prior).__name__}"
        found_ = f"{type(guide).__name__} (latents on the {got})"
        raise InputError(f"expected {what}, got {found_}: use {' or '.join(matching)}")
    if getattr(prior, "guide", guide) is not guide:
        what = f"{type(prior).__name__} to be built on the family of the same VAE"
        advice = "pass it the family that is the VAE's guide"
        raise InputError(f"expected {what}, got another one, which nobody trains: {advice}")
    parts = [part for part in (prior, likelihood, guide) if hasattr(part, "latent_dim")]
    sizes = {type(part).__name__: part.latent_dim for part in parts if part.latent_dim is not None}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"expected one latent dimension, got {said}: give each the same")
