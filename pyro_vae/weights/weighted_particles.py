"""Weighted particles for training: drawn and scored many at once, differentiable, cheap to repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.beta import latent_scale_of
from pyro_vae.errors import InputError
from pyro_vae.pair.functions import evaluation_mode
from pyro_vae.pair.sites import (
    Given,
    Latents,
    Site,
    check_latents_match,
    check_site,
    data_dim,
    is_delta,
    latent_sites,
    refuse_score_function,
    sample_sites,
    sum_to,
    unscaled_log_prob,
)
from pyro_vae.weights.particles import agree, first_faithful, stacked, tile, tile_latents, untile
from pyro_vae.weights.pathwise import PathwiseDraws, gated, has_score

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Pieces(NamedTuple):
    """Log-densities ``(num_particles, N)``, float64, without scales and with the beta handler's."""

    plain: Tensor
    scaled: Tensor


class Draws(NamedTuple):
    """Latents of all particles, and the guide's density of them.

    Attributes:
        latents: by site name, ``(num_particles, *shape of one draw)``.
        log_proposal: log q.
        drawn: groups of the draws before their gates (see :class:`PathwiseDraws`) with the slopes of
            the scaled log q; each group holds the particles named by a slice. Empty if not gated.
        subsample: the indices drawn by subsampling plates; the model must see the same.
        plate_scale: full size over drawn size of the data plate.
        proposal_scale: the beta handler's scale on the guide's latents.
    """

    latents: Latents
    log_proposal: Pieces
    drawn: list[tuple[slice, dict[str, Tensor], dict[str, Tensor]]]
    subsample: dict[str, Any]
    plate_scale: float
    proposal_scale: Any


class WeightedParticles:
    """How the particles of one pair are drawn and scored; found out once, by plain calls.

    Particles are drawn in an outer plate, so that an encoder runs once per datum, or as if they were
    more data, or one after the other; they are scored under ``torch.vmap``, or as more data, or one
    after the other. The first way that agrees with plain calls is kept.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        arguments: positional and keyword arguments of both.
        plate: name of the data plate.
        num_particles: how many there will be; with one, nothing is batched.

    Raises:
        InputError: a pair that can't be weighed per datum, with the site's name.
    """

    def __init__(
        self, model: Any, guide: Any, arguments: Arguments, plate: str, num_particles: int
    ) -> None:
        self.plate = plate
        with poutine.block(), torch.no_grad():
            self._inspect(model, guide, arguments)
            self._draw, self._score = self._draw_plain, self._score_plain
            if num_particles > 1:
                self._draw = self._find_drawing(guide, arguments)
                self._score = self._find_scoring(model, guide, arguments)

    def draw(self, guide: Any, arguments: Arguments, num_particles: int, *, gates: bool) -> Draws:
        """Draw from the guide.

        Args:
            guide: the pair's guide, with or without the beta handler.
            arguments: positional and keyword arguments.
            num_particles: draws per datum.
            gates: keep the draws apart from what is computed of them, with the slopes of log q.
        """
        return self._draw(guide, arguments, num_particles, gates)

    def score(self, model: Any, arguments: Arguments, draws: Draws) -> tuple[Pieces, Pieces]:
        """Score the draws under the model: log p(x given z) and log p(z)."""
        values: tuple[Tensor, ...] = self._score(model, arguments, draws)
        return Pieces(*values[:2]), Pieces(*values[2:])

    # Drawing from the guide.

    def _draw_plain(self, guide: Any, arguments: Arguments, num_particles: int, gates: bool) -> Draws:
        rows: list[Draws] = []
        for index in range(num_particles):
            with Given(rows[0].subsample if rows else {}):
                trace, drawn = self._run(guide, arguments, gates, slice(index, index + 1))
            drawn = [(at, *({n: v[None] for n, v in g.items()} for g in gs)) for at, *gs in drawn]
            latents = {name: trace.nodes[name]["value"][None] for name in self.axes}
            rows.append(self._draws(trace, latents, drawn, lambda value: value[None]))
        return rows[0]._replace(
            latents={name: torch.cat([row.latents[name] for row in rows]) for name in self.axes},
            log_proposal=Pieces(*map(torch.cat, zip(*(r.log_proposal for r in rows), strict=True))),
            drawn=[group for row in rows for group in row.drawn],
        )

    def _draw_under_plate(
        self, guide: Any, arguments: Arguments, num_particles: int, gates: bool
    ) -> Draws:
        dim = -self._nesting - 1
        batched = pyro.plate("_particles", num_particles, dim=dim)(guide)  # inside the gates
        with pyro.validation_enabled(False):
            trace, drawn = self._run(batched, arguments, gates, slice(None))
        latents = {}
        for name, dims in self._dims.items():
            value = trace.nodes[name]["value"]
            latents[name] = value.reshape(num_particles, *value.shape[value.dim() - dims :])
        return self._draws(trace, latents, drawn, lambda value: value, dim)

    def _draw_tiled(self, guide: Any, arguments: Arguments, num_particles: int, gates: bool) -> Draws:
        trace, drawn = self._run(guide, _tiled(arguments, num_particles), gates, slice(None))
        latents = {
            name: untile(trace.nodes[name]["value"], axis, num_particles)
            for name, axis in self.axes.items()
        }
        # Gates and slopes see the tiled values: bring them to particles first, as a view.
        drawn = [
            (at, *({n: untile(v, self.axes[n], num_particles) for n, v in g.items()} for g in gs))
            for at, *gs in drawn
        ]
        draws = self._draws(trace, latents, drawn, lambda value: value.view(num_particles, -1))
        _refuse_subsample(draws)
        return draws

    def _run(self, guide: Any, arguments: Arguments, gates: bool, rows: slice) -> Any:
        """Trace and score the guide; return the trace and the group of gated draws."""
        draws = PathwiseDraws()
        function = gated(guide, draws) if gates else guide
        trace = poutine.trace(function).get_trace(*arguments[0], **arguments[1])
        trace.compute_score_parts()
        sites = sample_sites(trace)
        if not gates:
            return trace, []
        for site in sites:
            if not has_score(site):
                raise InputError(
                    "expected random draws for the doubly reparameterised gradient, "
                    f"{site['name']!r} of the guide is a point mass or a factor: use "
                    'gradient="plain"'
                )
        scales = {scale for site in sites if not isinstance(scale := latent_scale_of(site), Tensor)}
        if len(scales) > 1:
            raise InputError(
                f"expected one beta for all latents of the guide, got {sorted(scales)}: scale the "
                'guide as a whole, or use gradient="plain"'
            )
        terms = [latent_scale_of(site) * unscaled_log_prob(site).sum() for site in sites]
        return trace, [(rows, draws.drawn, draws.slopes(torch.stack(terms).sum()))]

    def _draws(
        self,
        trace: Trace,
        latents: Latents,
        drawn: list[Any],
        shape: Callable[[Tensor], Tensor],
        particle_dim: int | None = None,
    ) -> Draws:
        sites = sample_sites(trace)
        subsample = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and site_is_subsample(site)
            and len(site["value"]) < site["fn"].size
        }
        frames = (frame for site in sites for frame in site["cond_indep_stack"])
        frame = next(frame for frame in frames if frame.name == self.plate)
        return Draws(
            latents,
            Pieces(*map(shape, self._totals(sites, particle_dim))),
            drawn,
            subsample,
            (frame.full_size or frame.size) / frame.size,
            latent_scale_of(sites[0]),
        )

    # Scoring under the model.

    def _score_plain(self, model: Any, arguments: Arguments, draws: Draws) -> Any:
        count = len(draws.log_proposal.plain)
        return stacked(
            [
                self._score_one(model, arguments, {n: v[k] for n, v in draws.latents.items()}, draws)
                for k in range(count)
            ]
        )

    def _score_under_vmap(self, model: Any, arguments: Arguments, draws: Draws) -> Any:
        with pyro.validation_enabled(False):
            return torch.vmap(
                lambda latents: self._score_one(model, arguments, latents, draws),
                randomness="different",
            )(draws.latents)

    def _score_tiled(self, model: Any, arguments: Arguments, draws: Draws) -> Any:
        count = len(draws.log_proposal.plain)
        _refuse_subsample(draws)
        latents = tile_latents(draws.latents, self.axes)
        values = self._score_one(model, _tiled(arguments, count), latents, draws)
        return tuple(value.view(count, -1) for value in values)

    def _score_one(self, model: Any, arguments: Arguments, latents: Latents, draws: Draws) -> Any:
        with Given({**latents, **draws.subsample}):
            trace = poutine.trace(model).get_trace(*arguments[0], **arguments[1])
        trace.compute_log_prob()
        sites = sample_sites(trace)
        observed = self._totals([site for site in sites if site["is_observed"]])
        latent = self._totals([site for site in sites if not site["is_observed"]])
        return (*observed, *latent)

    def _totals(self, sites: list[Site], particle_dim: int | None = None) -> tuple[Tensor, Tensor]:
        """Sum over all but data (and particles): without scales, and with the beta handler's."""
        plain, scaled = [], []
        for site in sites:
            kept = (data_dim(site, self.plate), particle_dim or 0)
            total = sum_to(unscaled_log_prob(site), kept)
            plain.append(total)
            scaled.append(total * latent_scale_of(site))
        return _sum(plain), _sum(scaled)

    # Finding out, once.

    def _inspect(self, model: Any, guide: Any, arguments: Arguments) -> None:
        """Run the pair plainly and refuse what can't be weighed rightly."""
        args, kwargs = arguments
        # Gated for its refusal of a guide that is a handler.
        guide_trace = poutine.trace(gated(guide, PathwiseDraws())).get_trace(*args, **kwargs)
        given = {
            name: site["value"]
            for name, site in guide_trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        with Given(given):
            model_trace = poutine.trace(model).get_trace(*args, **kwargs)
        latents = latent_sites(guide_trace)
        if not latents:
            raise InputError("expected a guide that draws a latent, got none: add pyro.sample to it")
        check_latents_match(model_trace, guide_trace)
        for kind in (True, False):
            if not any(site["is_observed"] is kind for site in sample_sites(model_trace)):
                raise InputError(
                    f"expected a model with {'an observed site' if kind else 'a latent'}, got none: "
                    "add one by pyro.sample, and pass the model before the guide"
                )
        sites = [("guide", s) for s in sample_sites(guide_trace)]
        sites += [("model", s) for s in sample_sites(model_trace)]
        frames = [frame for _, site in sites for frame in site["cond_indep_stack"]]
        size = next((frame.size for frame in frames if frame.name == self.plate), 0)
        for function, site in sites:
            _refuse_summed_out(site, self.plate)
            check_site(function, site, self.plate, size)
        guide_trace.compute_score_parts()
        refuse_score_function(sample_sites(guide_trace), "IWAE")
        self._nesting = max(-frame.dim for frame in frames if frame.vectorized)
        self._dims = {site["name"]: site["value"].dim() for site in latents}
        self.axes = {
            site["name"]: data_dim(site, self.plate) - site["fn"].event_dim for site in latents
        }
        self._point_masses = {site["name"] for site in latents if is_delta(site["fn"])}

    def _find_drawing(self, guide: Any, arguments: Arguments) -> Any:
        def is_faithful(draw: Callable[..., Draws], count: int) -> bool:
            draw(guide, arguments, count, False)  # in the mode of training, where it must run too
            with evaluation_mode(guide):
                batched = draw(guide, arguments, count, False)
                random = {n: v for n, v in batched.latents.items() if n not in self._point_masses}

                def plain(latents: Latents) -> tuple[Tensor, ...]:
                    rows = []
                    for index in range(count):
                        given = {name: value[index] for name, value in latents.items()}
                        with Given({**given, **batched.subsample}):
                            rows.append(self._draw_plain(guide, arguments, 1, False))
                    log_proposal = torch.cat([row.log_proposal.plain for row in rows])
                    return log_proposal, *(torch.cat([r.latents[n] for r in rows]) for n in self.axes)

                found = (batched.log_proposal.plain, *(batched.latents[n] for n in self.axes))
                return agree(found, plain, random)

        ways = {self._draw_under_plate: 4, self._draw_tiled: 8}
        return first_faithful(ways, is_faithful, self._draw_plain, "guide")

    def _find_scoring(self, model: Any, guide: Any, arguments: Arguments) -> Any:
        def is_faithful(score: Callable[..., Any], count: int) -> bool:
            draws = self._draw(guide, arguments, count, False)
            score(model, arguments, draws)
            with evaluation_mode(model):
                return agree(
                    tuple(score(model, arguments, draws)),
                    lambda latents: self._score_plain(
                        model, arguments, draws._replace(latents=latents)
                    ),
                    draws.latents,
                )

        ways = {self._score_under_vmap: 2, self._score_tiled: 8}
        return first_faithful(ways, is_faithful, self._score_plain, "model")


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _tiled(arguments: Arguments, count: int) -> Arguments:
    """Repeat the arguments so that every particle of every datum is a row, particles outermost."""
    args, kwargs = arguments
    if kwargs or not all(isinstance(value, Tensor) and value.dim() for value in args):
        raise ValueError("only tensors that count the data can be repeated")
    return tile(args, count), {}


def _refuse_subsample(draws: Draws) -> None:
    if draws.subsample:
        raise ValueError("a subsample's indices count the data, not the particles")


def _refuse_summed_out(site: Site, plate: str) -> None:
    """Refuse enumerated sites, and plates inside the data's that subsample."""
    if site["infer"].get("enumerate"):
        raise InputError(
            f"expected sites that are drawn, {site['name']!r} is enumerated: use Pyro's "
            "TraceEnum_ELBO, or draw it"
        )
    for frame in site["cond_indep_stack"]:
        if frame.name != plate and frame.full_size and frame.full_size > frame.size:
            raise InputError(
                f"expected no subsampling inside the data plate, plate {frame.name!r} at site "
                f"{site['name']!r} does: the log of a mean of weights can't be subsampled"
            )
