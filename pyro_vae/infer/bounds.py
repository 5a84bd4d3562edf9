"""Bounds on log p(x) as objectives: what each reports, and the base that Pyro's SVI and fit share."""

import warnings
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.util import site_is_subsample
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.pair.enumeration import is_enumerated, sum_out
from pyro_vae.pair.sites import TracePair, plate_scale


class BoundTerms(NamedTuple):
    """What one evaluation of a bound gives: 0-dim tensors, in nats, sums over all the data points.

    Those are the ones the data plate stands for: a plate that subsamples scales all four, so that
    each estimates its value for the full plate.

    Attributes:
        loss: the negative bound, detached, accumulated in float64.
        surrogate: what is differentiated; only its gradient means anything.
        rate: sum of log q(z given x) - log p(z), mean over particles, detached.
        distortion: sum of -log p(x given z), mean over particles, detached. Beta is taken out of
            both and masks kept: minus their sum is the plain ELBO.
    """

    loss: Tensor
    surrogate: Tensor
    rate: Tensor
    distortion: Tensor


class Bound(ELBO):
    """Base of the objectives; also the recipe for one of your own.

    Write :meth:`terms_of`, or :meth:`terms` if it draws in a way of its own. The object then works in
    Pyro's own ``SVI(model, guide, optim, bound)``, in :func:`pyro_vae.fit`, and captured as a graph.
    For the last, ``terms`` must read no tensor's value in Python (no ``.item()``, no ``if`` on a
    tensor) and must draw in the same order every time.

    The loss is the negative bound on log p(x): plates' subsampling scales it, beta does not.
    :class:`TraceBound` alone keeps beta in its loss, as Pyro's ``Trace_ELBO`` does.

    Attributes:
        sums_out: whether it sums over what the model enumerates and the guide does not draw.

    Args:
        num_particles: draws per datum.
        max_plate_nesting: as in Pyro's ``ELBO``.
        vectorize_particles: draw the particles in one outer plate instead of one after the other.
        options: the other options of Pyro's ``ELBO``.

    Example:
        >>> from pyro_vae.infer import StickingTheLanding
        >>> objective = StickingTheLanding(num_particles=2)
        >>> # pyro.infer.SVI(vae.model, vae.guide, optimizer, objective).step(x)
    """

    sums_out = False

    def terms(self, model: Any, guide: Any, args: Any, kwargs: Any) -> BoundTerms:
        """Draw once, both functions given ``*args`` and ``**kwargs``; return the terms."""
        return self.terms_of(list(self._get_traces(model, guide, args, kwargs)))

    def terms_of(self, traces: list[TracePair]) -> BoundTerms:
        """Return the same of pairs that are traced and scored, one for each particle."""
        raise NotImplementedError

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Estimate the negative bound, summed over the batch, in nats."""
        return _read(self.terms(model, guide, args, kwargs).loss)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return a tensor with the value of the loss and the gradient of the surrogate."""
        terms = self.terms(model, guide, args, kwargs)
        warn_if_nan(terms.surrogate, "loss")
        return terms.loss + (terms.surrogate - terms.surrogate.detach())

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Estimate the negative bound; add the surrogate's gradient to the parameters' ``grad``."""
        terms = self.terms(model, guide, args, kwargs)
        if terms.surrogate.requires_grad:
            terms.surrogate.backward(retain_graph=self.retain_graph)
        return _read(terms.loss)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> TracePair:
        nesting = self.max_plate_nesting
        model_trace, guide_trace = get_importance_trace("flat", nesting, model, guide, args, kwargs)
        for name, site in _samples(model_trace) + _samples(guide_trace):
            if site["infer"].get("enumerate"):  # summed out: there is no single draw to score
                advice = "use Pyro's TraceEnum_ELBO, or draw it"
                raise InputError(f"expected sites that are drawn, {name!r} is enumerated: {advice}")
        return model_trace, guide_trace


class TraceBound(Bound):
    r"""The ELBO of Pyro's ``Trace_ELBO``: same draws, same loss and same gradient from one seed.

    .. math:: -L = E_q[\log q(z|x) - \log p(z) - \log p(x|z)]

    Sites without a reparameterised draw get Pyro's score-function term (Rao-Blackwellised over
    plates); reparameterised ones the pathwise gradient. Unlike ``Trace_ELBO`` it reads no value in
    Python, so that it can be captured, and it reports rate and distortion. Options are those of
    :class:`Bound`.

    Raises:
        InputError: at the first use, for a site that is enumerated.

    Source:
        Kingma, Welling 2014, equation 3; Ranganath, Gerrish, Blei 2014, "Black Box Variational
        Inference", for the score-function term.
    """

    def terms_of(self, traces: list[TracePair]) -> BoundTerms:
        """Return loss (beta in it), surrogate, rate and distortion of traced, scored pairs."""
        loss: Any = 0.0
        surrogate: Any = 0.0
        for model_trace, guide_trace in traces:
            for sign, trace in ((-1.0, model_trace), (1.0, guide_trace)):
                for _, site in _samples(trace):
                    loss = loss + sign * wide(site["log_prob_sum"].detach())
            surrogate = surrogate + _surrogate(model_trace, guide_trace)
        rate, distortion = elbo_terms(traces, self.num_particles)
        count = self.num_particles
        return BoundTerms(loss / count, surrogate / count, rate, distortion)


def _surrogate(model_trace: Any, guide_trace: Any) -> Tensor:
    """Return what Pyro differentiates for one pair of traces: the negative surrogate ELBO."""
    surrogate: Any = 0.0
    log_r = None
    for _, site in _samples(model_trace):
        surrogate = surrogate - site["log_prob_sum"]
    for _, site in _samples(guide_trace):
        _, score_function, entropy = site["score_parts"]
        if not is_identically_zero(entropy):
            surrogate = surrogate + entropy.sum()
        if not is_identically_zero(score_function):
            if log_r is None:
                log_r = _compute_log_r(model_trace, guide_trace)
            surrogate = surrogate - (log_r.sum_to(site["cond_indep_stack"]) * score_function).sum()
    return surrogate


def _samples(trace: Any) -> list[tuple[str, Any]]:
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]


def _read(loss: Tensor) -> float:
    value = float(loss)
    if value != value:
        warnings.warn("Encountered NaN: loss", stacklevel=3)
    return value


def elbo_terms(traces: list[TracePair], num_particles: int) -> tuple[Tensor, Tensor]:
    """Return rate and distortion of an ELBO's traces, sums over the full plates.

    Beta is taken out, masks and the scales of plates that subsample are kept, so minus their sum
    estimates the ELBO of all the data points whatever was optimised. What the model enumerates alone
    is summed out of both. NaN for an ELBO that sums over enumerated values of the guide, whose traces
    hold no single draw.
    """
    terms: list[list[Tensor]] = [[], []]
    for model_trace, guide_trace in traces:
        for trace in (model_trace, guide_trace):
            of_guide = trace is guide_trace
            sites = [site for _, site in _samples(trace) if not site_is_subsample(site)]
            if any(is_enumerated(site) for site in sites):
                if of_guide or any(is_enumerated(site) for _, site in _samples(guide_trace)):
                    unknown = torch.full((), torch.nan, device=sites[0]["value"].device)
                    return unknown, unknown
                for term, value in zip(terms, _summed_terms(trace, sites), strict=True):
                    term.append(value)
                continue
            for site in sites:
                log_prob = wide(site["unscaled_log_prob"].detach())
                total = scale_and_mask(log_prob, scale=plate_scale(site), mask=site["mask"]).sum()
                terms[site["is_observed"] and not of_guide].append(total if of_guide else -total)
    zero = next((torch.zeros_like(term[0]) for term in terms if term), torch.zeros(()))
    # Apart: a captured step that uses one of them computes but that.
    rate, distortion = (torch.stack(term or [zero]).sum() / num_particles for term in terms)
    return rate, distortion


def _summed_terms(trace: Any, sites: list[Any]) -> tuple[Tensor, Tensor]:
    """Return minus log p(z) and minus log p(x|z) of a model trace, enumerated latents summed out."""
    prior, joint = (
        torch.stack([plate_scale(site) * term.sum() for site, term in sum_out(trace, some)]).sum()
        for some in ([site for site in sites if not site["is_observed"]], sites)
    )
    return -prior.detach(), (prior - joint).detach()


def particle_options(objective: ELBO) -> dict[str, Any]:
    """Return an objective's particles and plates, as the constructor of another takes them."""
    names = ("num_particles", "max_plate_nesting", "vectorize_particles")
    options = {name: getattr(objective, name) for name in names}
    # Pyro's constructor adds the particles' own plate to the nesting it is given.
    options["max_plate_nesting"] -= objective.vectorize_particles and objective.num_particles > 1
    return options


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, or as it is where the device has no float64."""
    return tensor if tensor.device.type == "mps" else tensor.double()
