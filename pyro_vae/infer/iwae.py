"""The importance-weighted bound with the doubly reparameterised or the plain gradient."""

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.beta import unscaled_function
from pyro_vae.errors import InputError, check_choice, whole_number
from pyro_vae.infer.bounds import Bound, BoundTerms
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.opened import Knowledge, OpenedPair
from pyro_vae.pair.sites import Latents
from pyro_vae.pair.state import Remembered
from pyro_vae.weights.particles import Draws, Particles
from pyro_vae.weights.pathwise import refuse_handler

_GRADIENTS = ("doubly-reparameterized", "plain")


class IWAE(Bound):
    r"""Importance-weighted autoencoder: the log of the mean weight, for each datum by itself.

    .. math:: L_K(x) = E[\log \frac1K \sum_k w_k], \quad w_k = p(x, z_k) / q(z_k | x)

    Between the ELBO (K = 1) and log p(x), which it nears as 1/K. The mean is over the particles of
    one datum, inside the data plate; the weight is the one of :func:`pyro_vae.log_weights`.

    The plain gradient differentiates the bound. Its signal on the guide's parameters falls as 1/K and
    its noise only as 1/sqrt(K). The doubly reparameterised one (DReG) has the same mean and no such
    fault; with the normalised weights v_k = w_k / sum w,

    .. math:: \nabla_\phi = \sum_k v_k^2 \, \partial_z \log w_k \, \partial_\phi z_k, \quad
              \nabla_\theta = \sum_k v_k \, \partial_\theta \log p(x, z_k)

    No parameter is named: the guide's are those that a draw depends on, the generative ones those
    that log p depends on at fixed draws. Parameters in both roles, as the encoder's under a
    VampPrior, get both terms; the variance falls in the guide's (for the other see Bauer, Mnih 2021,
    "Generalized Doubly Reparameterized Gradient Estimators").

    With beta the latent terms are scaled inside the weights, and v_k^2 becomes
    v_k (1 - beta + beta v_k), which keeps DReG's mean that of the plain gradient. The loss is minus
    the bound without beta.

    Particles are drawn and scored many at once where that agrees with plain calls, found out at the
    first use of a pair; a pair that is called particle by particle instead is named in a warning.

    Args:
        num_particles: draws per datum, K.
        gradient: ``"doubly-reparameterized"`` or ``"plain"``.
        plate: name of the data plate; None: the whole data set is one datum.

    Raises:
        InputError: options out of range; at the first use, a pair without a weight per datum (a site
            outside the data plate, a scale of the user's own), a latent that is not reparameterised,
            and, under DReG, a point mass or factor in the guide.

    Source:
        Burda, Grosse, Salakhutdinov 2016, "Importance Weighted Autoencoders", equation 8; Tucker,
        Lawson, Gu, Maddison 2019, "Doubly Reparameterized Gradient Estimators for Monte Carlo
        Objectives", equation 8; Rainforth et al. 2018, "Tighter Variational Bounds are Not
        Necessarily Better", for the fault of the plain one.
    """

    sums_out = True

    def __init__(
        self, num_particles: int, gradient: str = _GRADIENTS[0], *, plate: str | None = "data"
    ) -> None:
        num_particles = whole_number("num_particles", num_particles, least=1)
        check_choice("gradient", gradient, _GRADIENTS)
        super().__init__(num_particles=num_particles)
        self.gradient, self.plate = gradient, plate
        self._known: Remembered[Knowledge] = Remembered()

    def terms(self, model: Any, guide: Any, args: Any, kwargs: Any) -> BoundTerms:
        """Draw once and return loss, surrogate, rate and distortion."""
        particles = Particles(self._open(model, guide, args, kwargs))
        doubly = self.gradient == "doubly-reparameterized"
        draws = particles.draw_from_guide(self.num_particles, gates=doubly)
        # The model's own copies: what its gradient is multiplied by on the way back to a draw is
        # known only once the draws are weighed.
        copies = {name: value.view_as(value) for name, value in draws.latents.items()}
        scored = particles.score_under("model", copies, draws.subsample)
        log_joint = scored.observed + scored.scaled_latent
        surrogate = _log_mean_exp(log_joint - draws.scaled_log_proposal).sum()
        if doubly:
            surrogate = _doubly_reparameterized(particles.axes, draws, copies, log_joint)
        log_likelihood = scored.observed.detach()
        rates = (draws.log_proposal - scored.latent).detach()
        bound = _log_mean_exp(log_likelihood - rates).sum()
        scale = draws.plate_scale
        rate, distortion = rates.mean(0).sum(), -log_likelihood.mean(0).sum()
        return BoundTerms(-scale * bound, -scale * surrogate, scale * rate, scale * distortion)

    def _open(self, model: Any, guide: Any, args: Any, kwargs: Any) -> OpenedPair:
        """Open the pair of a step with what is known of it, or find out and remember."""
        functions = unscaled_function(model), unscaled_function(guide)
        known = self._known.get(*functions)
        how: Any = {"serves": Serves.WHOLE | Serves.SUMMED, "knowledge": known or Knowledge()}
        pair = OpenedPair(model, guide, args, kwargs, plate=self.plate, **how)
        if known is not None:
            return pair
        refuse_handler(guide)
        with pair.put_back(), poutine.block(), torch.no_grad():
            pair.knowledge.structure = structure = pair.inspect()
            particles = Particles(pair)
            for name, latent in structure.latents.items():
                if latent.is_enumerated:
                    wanted, advice = "sites that are drawn", "use Pyro's TraceEnum_ELBO, or draw it"
                    raise InputError(f"expected {wanted}, {name!r} is enumerated: {advice}")
                if not latent.is_reparameterized:
                    what, mend = "reparameterised latents for IWAE", "use Trace_ELBO or TraceBound"
                    raise InputError(f"expected {what}, {name!r} ({latent.family}) is not: {mend}")
            if self.num_particles > 1:
                draws = particles.draw_from_guide(2)
                particles.score_under("model", draws.latents, draws.subsample)
        self._known.keep(pair.knowledge, *functions)
        return pair


def _doubly_reparameterized(axes: Any, draws: Draws, copies: Latents, log_joint: Tensor) -> Tensor:
    """Return a tensor whose gradient is the doubly reparameterised one, summed over the data."""
    weights = (log_joint - draws.scaled_log_proposal).detach().softmax(0)
    # E[v dlog q/dphi] = E[dv/dz dz/dphi], and dv/dz = v (1 - v) dlog w/dz: of the plain gradient,
    # v dlog w/dz dz/dphi - beta v dlog q/dphi, remains v (1 - beta (1 - v)) dlog w/dz dz/dphi.
    factor = 1 - draws.proposal_scale * (1 - weights)
    for name, copy in copies.items():
        if copy.requires_grad:
            along = _along(factor, copy, axes[name])
            copy.register_hook(lambda gradient, along=along: gradient * along)
    surrogate = (weights * log_joint).sum()
    for rows, drawn, slopes in draws.gates:
        for name, slope in slopes.items():
            along = _along((weights * factor)[rows], slope, axes[name])
            surrogate = surrogate - (along * slope * drawn[name]).sum()
    return surrogate


def _along(factor: Tensor, value: Tensor, axis: int) -> Tensor:
    """Shape ``(num_particles, N)`` to multiply a value ``(num_particles, ..., N, ...)``."""
    shape = [1] * value.dim()
    shape[0], shape[axis] = factor.shape
    return factor.reshape(shape).to(value.dtype)


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))
