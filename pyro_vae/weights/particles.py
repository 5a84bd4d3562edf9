"""The importance weight p(x, z) / q(z given x): many particles drawn and scored, one definition."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.beta import latent_scale_of
from pyro_vae.errors import InputError, whole_number
from pyro_vae.pair import sites as traced
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.enumeration import enumerate_latents, sum_out
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, eval_mode
from pyro_vae.pair.inputs import Data, tile_inputs
from pyro_vae.pair.opened import OpenedPair, open_pair
from pyro_vae.pair.precision import compute_in, multiply_in, precision_now
from pyro_vae.pair.sites import CALLING_ERRORS, Given, Latents, Site
from pyro_vae.weights.pathwise import PathwiseDraws, gated, has_score

# Stands for the draws of a guide that has nothing to draw, where the model sums all its latents out.
_NOTHING_DRAWN = "nothing drawn"

# Particles on which a way of batching is held against plain calls: one shows whether particles met
# each other's numbers. More where Python reads values, for a branch on them may take the right side
# for a few by luck; as many where particles pass for data, which such a branch may look at.
_HELD, _HELD_IF_READ, _HELD_IF_TILED = 1, 8, 8


class LogDensities(NamedTuple):
    """Log densities of drawn latents per data point, each ``(num_samples, N)``, float64, in nats."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_proposal: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) - log q(z given x)."""
        return self.log_likelihood + self.log_prior - self.log_proposal


class Scored(NamedTuple):
    """Log densities of given latents under one function, each ``(num_samples, N)``, float64, nats."""

    observed: Tensor  # of what is observed
    latent: Tensor
    scaled_latent: Tensor  # with the beta handler's scale


class Draws(NamedTuple):
    """Latents of all particles, and the guide's density of them."""

    latents: Latents  # each (num_particles, *shape of one draw)
    log_proposal: Tensor  # log q, (num_particles, N), float64, nats
    scaled_log_proposal: Tensor  # with the beta handler's scale
    # Which particles, their draws before their gates, the slopes there of the scaled log q.
    gates: list[tuple[slice, dict[str, Tensor], dict[str, Tensor]]]
    subsample: dict[str, Any]  # indices drawn by subsampling plates; the model must see the same
    plate_scale: float  # full size over drawn size of the data plate
    proposal_scale: Any  # the beta handler's, on the guide's latents


def log_weights(
    model: PairFunction, guide: PairFunction, x: Data, *, num_samples: int, plate: str | None = "data"
) -> Tensor:
    """Draw from the guide and return log importance weights ``(num_samples, N)``, float64, nats.

    .. math:: log w_{kn} = log p(x_n, z_{kn}) - log q(z_{kn} | x_n), z_{kn} ~ q(z | x_n)

    Sums over every plate but the data's and accumulates in float64. The scales of plates
    (subsampling) and of the beta handler are taken out; masks are kept. Gradients flow if they are
    enabled, and modules keep their mode. Discrete latents that the model marks
    ``infer={"enumerate": "parallel"}`` and the guide does not draw are summed out exactly.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``model(*x)``.
        num_samples: draws per datum.
        plate: name of the data plate. None: the whole data set is one datum, whatever plates and
            latents the model has, and p(x) its joint evidence; N is 1.

    Raises:
        InputError: a pair whose weights would be wrong, with the site's name: a latent outside the
            data plate, a latent that only one of the two draws, a scale set by ``poutine.scale``, a
            factor in the guide, a guide whose support is a part of the prior's.

    Source:
        Burda, Grosse, Salakhutdinov 2016, "Importance Weighted Autoencoders", equation 7.
    """
    num_samples = whole_number("num_samples", num_samples, least=1)
    pair = open_pair(model, guide, x, plate=plate, serves=Serves.WHOLE | Serves.SUMMED)
    with HANDLER_LOCK:
        densities = Particles(pair.part()).draw(num_samples)
    check_weights(densities)
    return densities.log_weights


class Particles:
    """Draws and scores many particles of an opened pair, which is on its device, at once.

    They are drawn in an outer plate, so that an encoder runs once per data point, or as if they were
    more data, or one after the other; they are scored under ``torch.vmap``, so that a function sees
    the shapes it was written for, or as more data, or one after the other. The first way that agrees
    with plain calls is kept with the pair; one that is called particle by particle is warned of.
    """

    def __init__(self, pair: OpenedPair) -> None:
        if pair.structure.why_unweighable is not None:
            raise InputError(pair.structure.why_unweighable)
        self.pair = pair
        self.axes = pair.axes or {_NOTHING_DRAWN: -1}
        self._shared = {n for n, latent in pair.structure.latents.items() if latent.is_shared}

    def draw(self, num_samples: int) -> LogDensities:
        """Draw ``num_samples`` latents per data point and score them under model and guide."""
        latents, log_proposal = self.propose(num_samples)
        return LogDensities(*self.score(latents), log_proposal)

    def propose(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Draw latents ``(num_samples, *shape of one draw)``, with log q ``(num_samples, N)``."""
        draws = self.draw_from_guide(num_samples)
        return draws.latents, draws.log_proposal

    def propose_from_prior(self, num_samples: int) -> Latents:
        """Draw latents from the model's prior, each ``(num_samples, *shape of one draw)``."""
        model, rows = poutine.trace(self.pair.model), []
        for _ in range(num_samples):
            sites = traced.latent_sites(model.get_trace(*self.pair.arguments, **self.pair.keywords))
            rows.append({site["name"]: site["value"] for site in sites})
        drawn = [name for name in rows[0] if name not in self.pair.structure.summed]
        return {n: self.with_axis(n, torch.stack([row[n] for row in rows])) for n in drawn}

    def score(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Score latents ``(num_samples, ...)``: log p(x|z), log p(z), each ``(num_samples, N)``."""
        scored = self.score_under("model", latents)
        return scored.observed, scored.latent

    def score_proposal(self, latents: Latents) -> Tensor:
        """Score latents ``(num_samples, ...)`` under the guide: log q ``(num_samples, N)``."""
        return self.score_under("guide", latents).latent

    def data_first(self, latents: Latents) -> Latents:
        """Move the data's axis of latents to the front: each ``(num_samples, N, ...)``, as a view."""
        named = [name for name in latents if name != _NOTHING_DRAWN]
        return {name: latents[name].movedim(self.axes[name], 1) for name in named}

    def with_axis(self, name: str, values: Tensor) -> Tensor:
        """Give a site's values ``(num_samples, ...)`` an axis for the data where they share it."""
        return values.unsqueeze(1) if name in self._shared else values

    def _without_axis(self, latents: Latents) -> Latents:
        """Return one particle's latents as the sites have them."""
        return {n: v[0] if n in self._shared else v for n, v in latents.items()}

    @property
    def num_data(self) -> int:
        """Number of data points, N."""
        return self.pair.num_data

    @property
    def latent_shapes(self) -> dict[str, torch.Size]:
        """Shape of each latent for one particle."""
        latents = self.pair.structure.latents
        return {name: latent.shape_for(self.num_data) for name, latent in latents.items()}

    def bytes_per_proposal(self) -> int:
        """Return the bytes that one more particle per data point needs in :meth:`propose`."""
        if self.pair.knowledge.ways.get("draws", "_draw_under_plate") == "_draw_under_plate":
            elements = sum(shape.numel() for shape in self.latent_shapes.values())
            return max(1, 4 * self.pair.inputs[0].element_size() * elements)
        return self.num_data * self.pair.structure.guide_bytes_per_datum

    def draw_from_guide(self, num_particles: int, *, gates: bool = False) -> Draws:
        """Draw from the guide; ``gates`` keeps the draws apart from what is computed of them."""
        if _NOTHING_DRAWN in self.axes:
            shape, device = (num_particles, self.num_data), self.pair.device
            nothing = torch.zeros(shape, dtype=torch.float64, device=device)
            return Draws({_NOTHING_DRAWN: nothing}, nothing, nothing, [], {}, 1.0, 1.0)
        ways = (self._draw_plain, self._draw_under_plate, self._draw_tiled)
        return self._run_first_that_holds(
            "draws", num_particles, ways, lambda draw: draw(num_particles, gates), self._draws_hold
        )

    def _draw_plain(self, num_particles: int, gates: bool) -> Draws:
        def as_rows(latents: Latents) -> Latents:
            return {name: self.with_axis(name, value[None]) for name, value in latents.items()}

        rows: list[Draws] = []
        for index in range(num_particles):
            with Given(rows[0].subsample if rows else {}):
                found = self._run_guide(self.pair.guide, self.pair, gates)
            which = slice(index, index + 1)
            rows.append(self._draws(found, as_rows, lambda value: value[None], which))
        names = ("log_proposal", "scaled_log_proposal")
        densities: Any = {n: torch.cat([getattr(row, n) for row in rows]) for n in names}
        return rows[0]._replace(
            latents={name: torch.cat([row.latents[name] for row in rows]) for name in self.axes},
            gates=[group for row in rows for group in row.gates],
            **densities,
        )

    def _draw_under_plate(self, num_particles: int, gates: bool) -> Draws:
        dim = -self.pair.structure.nesting - 1
        batched = pyro.plate("_particles", num_particles, dim=dim)(self.pair.guide)
        with pyro.validation_enabled(False):
            found = self._run_guide(batched, self.pair, gates)

        def unplate(values: Latents) -> Latents:
            unplated = {}
            for name, value in values.items():
                rank = len(self.pair.structure.latents[name].shape) - (name in self._shared)
                own = value.reshape(num_particles, *value.shape[value.dim() - rank :])
                unplated[name] = self.with_axis(name, own)
            return unplated

        return self._draws(found, unplate, lambda value: value, slice(None), dim)

    def _draw_tiled(self, num_particles: int, gates: bool) -> Draws:
        found = self._run_guide(self.pair.guide, _tile_pair(self.pair, num_particles), gates)

        def untile(values: Latents) -> Latents:  # as views
            split = {n: v.unflatten(self.axes[n], (num_particles, -1)) for n, v in values.items()}
            return {name: value.movedim(self.axes[name] - 1, 0) for name, value in split.items()}

        draws = self._draws(found, untile, lambda value: value.view(num_particles, -1), slice(None))
        _refuse_subsample(draws.subsample)
        return draws

    def _run_guide(self, guide: Any, pair: OpenedPair, gates: bool) -> Any:
        """Trace the guide; return the trace, and of gated draws the draws and their slopes."""
        draws = PathwiseDraws()
        function = gated(guide, draws) if gates else guide
        trace = poutine.trace(function).get_trace(*pair.arguments, **pair.keywords)
        if not gates:
            return trace, []
        sites = traced.sample_sites(trace)
        for site in sites:
            if not has_score(site):
                raise InputError(
                    "expected random draws for the doubly reparameterised gradient, "
                    f"{site['name']!r} of the guide is a point mass or a factor: use "
                    'gradient="plain"'
                )
        scales = {scale for site in sites if not isinstance(scale := latent_scale_of(site), Tensor)}
        if len(scales) > 1:
            wanted = "one beta for all latents of the guide"
            advice = 'scale the guide as a whole, or use gradient="plain"'
            raise InputError(f"expected {wanted}, got {sorted(scales)}: {advice}")
        terms = [latent_scale_of(site) * traced.site_log_prob(site).sum() for site in sites]
        return trace, [(draws.drawn, draws.slopes(torch.stack(terms).sum()))]

    def _draws(
        self, found: Any, convert: Any, shape: Any, which: slice, particle_dim: int = 0
    ) -> Draws:
        """Return what a run of the guide found, latents and densities in their own shapes."""
        trace, gates = found
        latents = convert({name: trace.nodes[name]["value"] for name in self.axes})
        groups = [(which, *map(convert, one)) for one in gates]
        sites = traced.sample_sites(trace)
        drawn = [s for s in trace.nodes.values() if s["type"] == "sample" and site_is_subsample(s)]
        subsample = {s["name"]: s["value"] for s in drawn if len(s["value"]) < s["fn"].size}
        plain, scaled = self._sum(sites, particle_dim)
        scales = traced.plate_scale(sites[0]), latent_scale_of(sites[0])
        return Draws(latents, shape(plain), shape(scaled), groups, subsample, *scales)

    def _draws_hold(self, draws: Draws, count: int) -> bool:
        """Compare batched draws with plain calls that are given the same random values."""
        count = min(count, len(draws.log_proposal))
        first = {name: value[:count].detach() for name, value in draws.latents.items()}
        # A point mass follows from the other sites; rounded differently its density would be 0.
        known = self.pair.structure.latents
        random = {name: v for name, v in first.items() if not known[name].is_point_mass}

        def plain(given: Latents) -> tuple[Tensor, ...]:
            rows = []
            for index in range(count):
                values = {name: value[index] for name, value in given.items()}
                with Given({**self._without_axis(values), **draws.subsample}):
                    row = self._draw_plain(1, False)
                rows.append((row.log_proposal, *row.latents.values()))
            return tuple(torch.cat(column) for column in zip(*rows, strict=True))

        return traced.agree((draws.log_proposal[:count].detach(), *first.values()), plain, random)

    def score_under(self, function: str, latents: Latents, subsample: Any = None) -> Scored:
        """Score latents ``(num_particles, ...)`` under ``"model"`` or ``"guide"``."""
        given = subsample or {}
        if _NOTHING_DRAWN in latents:  # all particles are alike
            row = self._score_one(function, self.pair, {}, given)
            return Scored(*(term.expand(_count(latents), -1) for term in row))

        def hold(scored: Scored, count: int) -> bool:
            first = {name: value[:count].detach() for name, value in latents.items()}
            found = tuple(term[:count].detach() for term in scored)
            return traced.agree(found, lambda some: self._score_plain(function, some, given), first)

        ways = (self._score_plain, self._score_under_vmap, self._score_tiled)
        return self._run_first_that_holds(
            function, _count(latents), ways, lambda score: score(function, latents, given), hold
        )

    def _score_plain(self, function: str, latents: Latents, subsample: dict[str, Any]) -> Scored:
        each = ({name: value[i] for name, value in latents.items()} for i in range(_count(latents)))
        rows = [self._score_one(function, self.pair, one, subsample) for one in each]
        return Scored(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _score_under_vmap(self, function: str, latents: Latents, subsample: dict[str, Any]) -> Scored:
        def one(given: Latents) -> Scored:
            return self._score_one(function, self.pair, given, subsample)

        with pyro.validation_enabled(False):
            return Scored(*torch.vmap(one, randomness="different")(latents))

    def _score_tiled(self, function: str, latents: Latents, subsample: dict[str, Any]) -> Scored:
        _refuse_subsample(subsample)
        count = _count(latents)
        moved = {n: value.movedim(0, self.axes[n] - 1) for n, value in latents.items()}
        tiled = {n: value.flatten(self.axes[n] - 1, self.axes[n]) for n, value in moved.items()}
        scored = self._score_one(function, _tile_pair(self.pair, count), tiled, subsample)
        return Scored(*(term.view(count, -1) for term in scored))

    def _score_one(self, function: str, pair: OpenedPair, latents: Latents, subsample: Any) -> Scored:
        """Score one particle: each term ``(N,)``."""
        given = {**self._without_axis(latents), **subsample}
        if function == "model" and pair.structure.summed:
            return self._score_summed(pair, given)
        with Given(given):
            run = poutine.trace(pair.model if function == "model" else pair.guide)
            sites = traced.sample_sites(run.get_trace(*pair.arguments, **pair.keywords))
        observed, _ = self._sum([site for site in sites if site["is_observed"]])
        latent, scaled = self._sum([site for site in sites if not site["is_observed"]])
        # The guide observes nothing, and a model of conditions alone has no latent of its own.
        nothing = torch.zeros_like(observed if latent is None else latent)
        return Scored(*(nothing if term is None else term for term in (observed, latent, scaled)))

    def _score_summed(self, pair: OpenedPair, given: Latents) -> Scored:
        """Score one particle under the model with what it enumerates summed out."""
        run = poutine.trace(enumerate_latents(pair.model, pair.structure.nesting, given))
        trace = run.get_trace(*pair.arguments, **pair.keywords)
        nothing = torch.zeros(pair.num_data, dtype=torch.float64, device=pair.device)
        latents = traced.latent_sites(trace)
        sums = [sum_out(trace, group) for group in (traced.sample_sites(trace), latents)]
        terms = [[traced.sum_to(term, self._kept(site)) for site, term in each] for each in sums]
        joint, prior = (sum(each, nothing) for each in terms)
        observed = torch.where(prior.isneginf(), 0.0, joint - prior)
        return Scored(observed, prior, prior * latent_scale_of(latents[0]))

    def _kept(self, site: Site, particle_dim: int = 0) -> tuple[int, ...]:
        own = () if self.pair.plate is None else (traced.data_dim(site, self.pair.plate),)
        return (*own, particle_dim)

    def _sum(self, sites: list[Site], particle_dim: int = 0) -> Any:
        """Sum over all but data and particles, plainly and with the beta handler's scale; or None."""
        if not sites:
            return None, None
        kept = [self._kept(site, particle_dim) for site in sites]
        found = zip(map(traced.site_log_prob, sites), kept, strict=True)
        plain = [traced.sum_to(log_prob, dims) for log_prob, dims in found]
        if self.pair.plate is None:
            plain = [term.unsqueeze(-1) for term in plain]
        total = torch.stack(torch.broadcast_tensors(*plain)).sum(0)
        scales = [latent_scale_of(site) for site in sites]
        if all(not isinstance(scale, Tensor) and scale == 1 for scale in scales):
            return total, total
        scaled = [term * scale for term, scale in zip(plain, scales, strict=True)]
        return total, torch.stack(torch.broadcast_tensors(*scaled)).sum(0)

    def _run_first_that_holds(
        self, what: str, num_particles: int,
        ways: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
        run: Callable[[Callable[..., Any]], Any], holds: Callable[[Any, int], bool],
    ) -> Any:  # fmt: skip
        """Run the first way that agrees with plain calls, remember it, and return its result.

        It is remembered for ``what``: "draws", "model" or "guide". The ``ways`` are particle by
        particle (as one alone is), all at once, and as if particles were data; ``run`` takes one, in
        the modules' own mode, and ``holds`` compares some particles of it, found in eval mode.
        """
        known, (plain, batched, tiled) = self.pair.knowledge.ways, ways
        if num_particles == 1:
            return run(plain)
        if what in known:
            return run(getattr(self, known[what]))
        kind = "model" if what == "model" else "guide"
        function = self.pair.model if kind == "model" else self.pair.guide
        training = any(module.training for module in self.pair.modules())
        held = _HELD_IF_READ if kind in self.pair.structure.reads_values else _HELD
        for way, count in ((batched, held), (tiled, _HELD_IF_TILED)):
            try:
                result = run(way)
                # Compared where nothing is random but what is given, and products round alike.
                mode = eval_mode(function) if training else nullcontext()
                again = training or precision_now() != "float32"
                exact = compute_in("float32", self.pair.device), multiply_in("float32")
                with torch.no_grad(), mode, self.pair.put_back(), exact[0], exact[1]:
                    agrees = holds(run(way) if again else result, count)
                if agrees:
                    known[what] = way.__name__
                    return result
            except CALLING_ERRORS as error:
                traced.raise_out_of_memory(error)
        instead = "it is called once per particle instead, which is exact but slow"
        found = f"the {kind} of this pair gives other values when its particles are batched"
        warnings.warn(f"{found}; {instead}", stacklevel=6)
        known[what] = plain.__name__
        return run(plain)


def check_weights(densities: LogDensities) -> None:
    """Refuse weights that are NaN or infinite, naming the term that made them so."""
    weights = densities.log_weights
    if not (weights.isnan() | weights.isposinf()).any():
        return
    names = (("log p(x|z)", 1), ("log p(z)", 1), ("log q(z|x)", -1))
    for (name, sign), term in zip(names, densities, strict=True):
        for kind, bad in (("NaN", term.isnan()), ("infinity", (sign * term).isposinf())):
            if bad.any():
                raise InputError(
                    f"expected finite log-probabilities, got {kind} in {name} for "
                    f"{int(bad.any(0).sum())} of {weights.shape[1]} data points: look for NaN "
                    "parameters, a log of a negative number or a scale of 0"
                )


def _tile_pair(pair: OpenedPair, count: int) -> OpenedPair:
    """Repeat the arguments: every particle of every data point is a row, particles outermost."""
    values = pair.arguments
    if pair.keywords or not all(isinstance(value, Tensor) and value.dim() for value in values):
        raise ValueError("only tensors that count the data can be repeated")
    return pair.on(tile_inputs(values, count))


def _refuse_subsample(subsample: dict[str, Any]) -> None:
    if subsample:
        raise ValueError("a subsample's indices count the data, not the particles")


def _count(latents: Latents) -> int:
    """Return the number of particles of a batch of latents."""
    return len(next(iter(latents.values())))
