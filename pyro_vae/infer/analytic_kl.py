"""The rate latent by latent, exact where it can be: the ELBO with closed-form KL, and free bits."""

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.distributions.kl import closed_form_kl
from pyro_vae.errors import InputError, check_choice, real_number
from pyro_vae.infer.bounds import Bound, BoundTerms, TraceBound, elbo_terms, particle_options, wide
from pyro_vae.pair.contract import are_same, refuse_score_function
from pyro_vae.pair.sites import Site, TracePair, is_delta, latent_sites, plate_scale, sample_sites

_PARTICLES = "num_particles_vectorized"  # Pyro's name of the outer plate of particles


class Divergence(NamedTuple):
    """What one latent adds to the rate: E log q - log p of the site, given its parents.

    Attributes:
        site: the guide's site.
        value: nats, masked and not scaled; the site's batch shape, followed by its event shape where
            ``by_dimension``.
        exact: whether it is a closed-form KL; otherwise log q - log p at the draw.
        by_dimension: whether q and p both factorise over the event's dimensions.
    """

    site: Site
    value: Tensor
    exact: bool
    by_dimension: bool


def divergences(model_trace: Trace, guide_trace: Trace) -> list[Divergence]:
    """Return what each latent of a traced and scored pair adds to the rate.

    A closed form is used where one is registered (``torch.distributions.kl.register_kl``) and the
    KL given the parents has the right mean: none of the latents that the model draws before this one
    is drawn after it by the guide. In a ladder read from the bottom, q(z1) q(z2 given z1) against
    p(z2) p(z1 given z2), that leaves z2 exact and z1 at its draw. Sites that only the guide has
    (auxiliary ones) give their log q.
    """
    in_model = {site["name"]: site for site in latent_sites(model_trace)}
    before_in_model, before_in_guide, found = list(in_model), set[str](), []
    for site in sample_sites(guide_trace):
        name = site["name"]
        if name not in in_model:
            value = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
            found.append(Divergence(site, value, False, False))
        else:
            parents = before_in_model[: before_in_model.index(name)]
            found.append(_divergence(in_model[name], site, before_in_guide.issuperset(parents)))
        before_in_guide.add(name)
    return found


def _divergence(model_site: Site, site: Site, closed_form: bool) -> Divergence:
    q, p = site["fn"], model_site["fn"]
    factors_q, factors_p = _factors(q), _factors(p)
    point_mass = is_delta(q)  # no KL but by the density that it is given
    by_dimension = not (factors_q.event_shape or factors_p.event_shape or point_mass)
    value = None
    if closed_form and not point_mass:
        value = closed_form_kl(factors_q, factors_p) if by_dimension else closed_form_kl(q, p)
    exact = value is not None
    if value is None and by_dimension:
        value = factors_q.log_prob(site["value"]) - factors_p.log_prob(site["value"])
    elif value is None:
        value = site["unscaled_log_prob"] - model_site["unscaled_log_prob"]
    mask = site["mask"]
    if isinstance(mask, Tensor) and by_dimension:
        mask = mask.reshape(mask.shape + (1,) * q.event_dim)
    shape = q.batch_shape + (q.event_shape if by_dimension else ())
    return Divergence(site, scale_and_mask(value.expand(shape), mask=mask), exact, by_dimension)


def _factors(distribution: Any) -> Any:
    """Return what a distribution repeats independently over its event's dimensions."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


class AnalyticKL(Bound):
    r"""The ELBO with the rate in closed form, site by site, where there is one.

    .. math:: -L = E_q[-\log p(x|z)] + KL(q(z|x) \,\|\, p(z))

    A latent without a registered KL is scored at its draw, as are those whose parents in the model
    come after them in the guide (where Pyro's ``TraceMeanField_ELBO`` would be wrong). Options are
    those of :class:`Bound`.

    Attributes:
        exact_sites: after the first use, for each latent whether its rate is exact.

    Raises:
        InputError: at the first use, for a latent that is not reparameterised or is enumerated.

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", equation 7.
    """

    exact_sites: dict[str, bool]

    def terms_of(self, traces: list[TracePair]) -> BoundTerms:
        """Return loss, surrogate, rate and distortion of pairs that are traced and scored."""
        found: list[list[Divergence]] = []
        scaled: Any = 0.0
        for model_trace, guide_trace in traces:
            refuse_score_function(sample_sites(guide_trace), type(self).__name__)
            observed = [site for site in sample_sites(model_trace) if site["is_observed"]]
            scaled = scaled - sum(site["log_prob_sum"] for site in observed)
            found.append(divergences(model_trace, guide_trace))
        self.exact_sites = {row.site["name"]: row.exact for row in found[0]}
        count = self.num_particles
        rows = [_weighed(row, plate_scale(row.site)) for particle in found for row in particle]
        rate = sum(row.detach().sum() for row in rows) / count
        distortion = elbo_terms(traces, count)[1]
        surrogate = scaled / count + self._differentiable_rate(found)
        return BoundTerms(rate + distortion, surrogate, torch.as_tensor(rate), distortion)

    def _differentiable_rate(self, found: list[list[Divergence]]) -> Any:
        """Return what is differentiated of the rate, from the divergences of each particle."""
        rows = [row for particle in found for row in particle]
        return sum(_weighed(row, row.site["scale"]).sum() for row in rows) / self.num_particles


def _weighed(row: Divergence, scale: Any) -> Tensor:
    dims = list(range(-row.site["fn"].event_dim, 0)) if row.by_dimension else []
    return scale_and_mask(wide(row.value.sum(dims) if dims else row.value), scale=scale)


class DefaultBound(AnalyticKL):
    """The ELBO that ``fit`` maximises by default: :class:`AnalyticKL` where it can be.

    A pair with latents that are not reparameterised, or with a scale or a mask in one function alone
    (which a closed form takes from the guide), has the terms of :class:`TraceBound`. The first use
    decides; it reads values, so that it must not be captured.
    """

    is_analytic: bool | None = None

    def terms_of(self, traces: list[TracePair]) -> BoundTerms:
        """Return loss, surrogate, rate and distortion of pairs that are traced and scored."""
        if self.is_analytic is None:
            self.is_analytic = _admits_closed_forms(*traces[0])
        bound: Any = super() if self.is_analytic else TraceBound(**particle_options(self))
        return bound.terms_of(traces)


def _admits_closed_forms(model_trace: Trace, guide_trace: Trace) -> bool:
    in_guide = {site["name"]: site for site in latent_sites(guide_trace)}
    shared = [(in_guide[site["name"]], site) for site in latent_sites(model_trace)]
    return all(site["fn"].has_rsample for site in in_guide.values()) and all(
        are_same(site[name], other[name]) for site, other in shared for name in ("scale", "mask")
    )


class FreeBits(AnalyticKL):
    r"""The ELBO whose rate is not pressed below a floor, which keeps latents in use.

    .. math:: E_q[\log p(x|z)] - \sum_j \max(\lambda, mean_n KL(q(z_j|x_n) \,\|\, p(z_j)))

    The mean is over the batch, so the floor binds on average and not for each datum. A unit j whose
    mean is below the floor gets no gradient from the rate. What a unit is:

    - ``per="dimension"``: each dimension of a latent whose q and p are both independent over
      dimensions (each element of plates other than the data's by itself). A latent with correlated
      dimensions (full-rank, flow, mixture) has no KL per dimension: it is one unit with the floor
      times its number of dimensions.
    - ``per="site"``: each latent site as a whole.

    The KL is the closed form where :class:`AnalyticKL` has one (see :attr:`exact_sites`), else
    log q - log p at the draws, averaged over batch and particles before the floor is applied. With
    beta the floored sum is scaled. The loss is the true negative ELBO, without floor or beta.

    Args:
        floor: lambda in nats (one bit is log 2 = 0.693 nats), at least 0.
        per: ``"dimension"`` or ``"site"``.
        plate: name of the data plate.
        options: the options of :class:`AnalyticKL`.

    Raises:
        InputError: options out of range; at the first use, for a latent that is not reparameterised
            or is enumerated, a point mass or an auxiliary site in the guide, and a scale that differs
            from datum to datum.

    Source:
        Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow",
        equation 15 (appendix C.8).
    """

    def __init__(
        self, floor: float, *, per: str = "dimension", plate: str = "data", **options: Any
    ) -> None:
        if not 0 <= real_number("floor", floor) < math.inf:
            raise InputError(f"expected a finite floor of at least 0 nats, got {floor}")
        check_choice("per", per, ("dimension", "site"))
        super().__init__(**options)
        self.floor, self.per, self.plate = floor, per, plate

    def _differentiable_rate(self, found: list[list[Divergence]]) -> Any:
        return sum(self._floored(rows) for rows in zip(*found, strict=True))

    def _floored(self, rows: tuple[Divergence, ...]) -> Tensor:
        """Return one site's rate with its floor, summed over the batch and scaled."""
        first = rows[0]
        site, name = first.site, first.site["name"]
        if is_delta(site["fn"]) or site["is_observed"] or site["infer"].get("is_auxiliary"):
            raise InputError(
                f"expected latents with a KL for FreeBits, {name!r} of the guide is a point mass, a "
                "factor or auxiliary: use TraceBound"
            )
        if isinstance(site["scale"], Tensor) and site["scale"].numel() > 1:
            wanted = f"one scale for all data at {name!r}"
            raise InputError(f"expected {wanted}, got a tensor: no floor on their mean")
        shift = site["fn"].event_dim if first.by_dimension else 0
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        data = [frame for frame in frames if frame.name == self.plate]
        meant = [frame.dim - shift for frame in frames if frame.name in (self.plate, _PARTICLES)]
        value = torch.stack([row.value for row in rows]).mean(0)
        units = value.mean(meant) if meant else value
        floor = self.floor
        if self.per == "site":
            units = units.sum()
        elif not first.by_dimension:
            floor = floor * site["fn"].event_shape.numel()
        return units.clamp(min=floor).sum() * (data[0].size if data else 1) * site["scale"]
