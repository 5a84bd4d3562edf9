"""The importance weight p(x, z) / q(z given x): one definition for every estimator.

The guide is drawn for all particles under an outer plate (so an encoder runs once per datum), the
model is scored for all particles at once under ``torch.vmap`` (so each call of the model sees the
shapes its author wrote it for). A function that does not survive its shortcut sees every particle as
a datum of its own, the inputs repeated; one that does not survive that either is called particle by
particle. Every shortcut is checked against plain calls before it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.errors import InputError
from pyro_vae.infer.objectives import latent_scale_of
from pyro_vae.infer.pair import HANDLER_LOCK, Inputs, PairFunction, as_inputs

__all__ = ["PairScorer", "Scores", "log_weights", "site_log_prob"]

Latents = dict[str, Tensor]

# What a pair may raise when particles are batched in a way it was not written for.
_BATCHING_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)


class Scores(NamedTuple):
    """Per-datum log densities of drawn latents, each ``(num_samples, N)``, float64, in nats."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_proposal: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) - log q(z given x)."""
        return self.log_likelihood + self.log_prior - self.log_proposal


def log_weights(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    num_samples: int,
    plate: str = "data",
) -> Tensor:
    """Draw from the guide and return log importance weights, one row per draw.

    .. math:: log w_{kn} = log p(x_n, z_{kn}) - log q(z_{kn} | x_n), z_{kn} ~ q(z | x_n)

    Sums over every plate but the data's and accumulates in float64. The scales of plates
    (subsampling) and of the beta handler are taken out; masks are kept. Gradients flow if they are
    enabled, and modules keep their mode.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``model(*x)``.
        num_samples: draws per datum.
        plate: name of the data plate.

    Returns:
        ``(num_samples, N)``, float64, nats.

    Raises:
        InputError: a pair that can't be weighed rightly, with the site's name: a latent outside the
            data plate, a latent that only one of the two draws, a scale set by ``poutine.scale``.

    Source:
        Burda, Grosse, Salakhutdinov 2016, "Importance Weighted Autoencoders", equation 7.
    """
    if num_samples < 1:
        raise InputError(f"expected num_samples of at least 1, got {num_samples}")
    with HANDLER_LOCK:
        return PairScorer(model, guide, as_inputs(x), plate=plate).draw(num_samples).log_weights


class PairScorer:
    """A pair bound to its data: draws latents from the guide and scores them under both.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        inputs: tensors that share their first dimension N.
        plate: name of the data plate.

    Attributes:
        num_data: N.
        latent_shapes: shape of each latent for one particle.
        bytes_per_datum: memory that scoring one particle of one datum allocates, an upper bound.

    Raises:
        InputError: a pair that can't be weighed rightly.
    """

    def __init__(
        self, model: PairFunction, guide: PairFunction, inputs: Inputs, *, plate: str = "data"
    ) -> None:
        self.model, self.guide, self.inputs, self.plate = model, guide, inputs, plate
        self.num_data = len(inputs[0])
        self._drawn_by: Callable[[int], tuple[Latents, Tensor]] | None = None
        self._scored_by: Callable[[Latents], tuple[Tensor, Tensor]] | None = None
        self._inspect()

    def draw(self, num_samples: int) -> Scores:
        """Draw ``num_samples`` latents per datum and score them under model and guide."""
        latents, log_proposal = self.propose(num_samples)
        return Scores(*self.score(latents), log_proposal)

    def propose(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Draw latents from the guide.

        Returns:
            the latents by site name, each ``(num_samples, *shape of one draw)``, and log q
            ``(num_samples, N)``.
        """
        return self._propose_plain(1) if num_samples == 1 else self._drawing()(num_samples)

    def bytes_per_proposal(self) -> int:
        """Return the bytes that one more particle per datum needs in :meth:`propose`."""
        if self._drawing() == self._propose_under_plate:
            elements = sum(math.prod(shape) for shape in self.latent_shapes.values())
            return max(1, 4 * self.inputs[0].element_size() * elements)
        return self.num_data * self._guide_bytes_per_datum

    def _drawing(self) -> Callable[[int], tuple[Latents, Tensor]]:
        if self._drawn_by is None:
            self._drawn_by = self._first_faithful(
                (self._propose_under_plate, self._propose_tiled),
                self._proposal_is_faithful,
                self._propose_plain,
                "guide",
            )
        return self._drawn_by

    def score(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Score latents ``(num_samples, ...)`` under the model.

        Returns:
            log p(x given z) and log p(z), each ``(num_samples, N)``.
        """
        if len(next(iter(latents.values()))) == 1:
            return self._score_plain(latents)
        if self._scored_by is None:
            two = {name: value[:2].detach() for name, value in latents.items()}
            self._scored_by = self._first_faithful(
                (self._score_under_vmap, self._score_tiled),
                lambda score: _all_close(score(two), self._score_plain(two)),
                self._score_plain,
                "model",
            )
        return self._scored_by(latents)

    # Drawing from the guide.

    def _propose_plain(self, num_samples: int) -> tuple[Latents, Tensor]:
        return _stacked([self._propose_one() for _ in range(num_samples)])

    def _propose_under_plate(self, num_samples: int) -> tuple[Latents, Tensor]:
        particles = pyro.plate("_particles", num_samples, dim=-self._nesting - 1)
        with particles, pyro.validation_enabled(False):
            trace = poutine.trace(self.guide).get_trace(*self.inputs)
        latents = {
            name: trace.nodes[name]["value"].reshape(num_samples, *shape)
            for name, shape in self.latent_shapes.items()
        }
        terms = [
            _sum_to(site_log_prob(site), (-self._nesting - 1, self._data_dim(site)))
            for site in _sample_sites(trace)
        ]
        return latents, torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def _propose_tiled(self, num_samples: int) -> tuple[Latents, Tensor]:
        trace = poutine.trace(self.guide).get_trace(*self._tiled_inputs(num_samples))
        latents = {
            name: trace.nodes[name]["value"]
            .unflatten(axis, (num_samples, self.num_data))
            .movedim(axis - 1, 0)
            for name, axis in self._data_axes.items()
        }
        return latents, self._total(_sample_sites(trace)).view(num_samples, self.num_data)

    def _propose_one(self) -> tuple[Latents, Tensor]:
        trace = poutine.trace(self.guide).get_trace(*self.inputs)
        latents = {name: trace.nodes[name]["value"] for name in self.latent_shapes}
        return latents, self._total(_sample_sites(trace))

    def _proposal_is_faithful(self, propose: Callable[[int], tuple[Latents, Tensor]]) -> bool:
        """Compare log q of two batched draws with plain calls that are given the same draws."""
        latents, log_proposal = propose(2)
        plain = []
        for index in range(2):
            with _Given({name: value[index] for name, value in latents.items()}):
                plain.append(self._propose_one()[1])
        return _all_close((log_proposal,), (torch.stack(plain),))

    # Scoring under the model.

    def _score_plain(self, latents: Latents) -> tuple[Tensor, Tensor]:
        rows = [
            self._score_one({name: value[index] for name, value in latents.items()})
            for index in range(len(next(iter(latents.values()))))
        ]
        return _stacked(rows)

    def _score_under_vmap(self, latents: Latents) -> tuple[Tensor, Tensor]:
        with pyro.validation_enabled(False):
            return torch.vmap(self._score_one, randomness="different")(latents)

    def _score_tiled(self, latents: Latents) -> tuple[Tensor, Tensor]:
        num_samples = len(next(iter(latents.values())))
        tiled = {
            name: value.movedim(0, axis - 1).flatten(axis - 1, axis)
            for name, value in latents.items()
            for axis in (self._data_axes[name],)
        }
        inputs = self._tiled_inputs(num_samples)
        terms = self._score_one(tiled, inputs)
        log_likelihood, log_prior = (term.view(num_samples, self.num_data) for term in terms)
        return log_likelihood, log_prior

    def _tiled_inputs(self, num_samples: int) -> Inputs:
        """Repeat the inputs so that every particle of every datum is a row, particles outermost."""
        return tuple(value.expand(num_samples, *value.shape).flatten(0, 1) for value in self.inputs)

    def _score_one(self, latents: Latents, inputs: Inputs | None = None) -> tuple[Tensor, Tensor]:
        with _Given(latents):
            trace = poutine.trace(self.model).get_trace(*(inputs or self.inputs))
        sites = _sample_sites(trace)
        observed = [site for site in sites if site["is_observed"]]
        latent = [site for site in sites if not site["is_observed"]]
        return self._total(observed), self._total(latent)

    # Shared.

    def _total(self, sites: list[dict[str, Any]]) -> Tensor:
        terms = [_sum_to(site_log_prob(site), (self._data_dim(site),)) for site in sites]
        if not terms:
            return torch.zeros(self.num_data, dtype=torch.float64, device=self.inputs[0].device)
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def _data_dim(self, site: dict[str, Any]) -> int:
        return next(frame.dim for frame in site["cond_indep_stack"] if frame.name == self.plate)

    def _first_faithful(
        self,
        candidates: Sequence[Callable[..., Any]],
        is_faithful: Callable[[Any], bool],
        plain: Callable[..., Any],
        function: str,
    ) -> Callable[..., Any]:
        """Return the first candidate that agrees with plain calls, or the plain call itself."""
        for candidate in candidates:
            try:
                with torch.no_grad():
                    if is_faithful(candidate):
                        return candidate
            except _BATCHING_ERRORS:
                continue
        warnings.warn(
            f"the {function} of this pair gives other values when its particles are batched; "
            "it is called once per particle instead, which is exact and slow",
            stacklevel=5,
        )
        return plain

    def _inspect(self) -> None:
        """Run the pair once, plainly, and refuse what can't be weighed rightly."""
        with torch.no_grad():
            with _AllocationCounter() as in_guide:
                guide_trace = poutine.trace(self.guide).get_trace(*self.inputs)
            latents = [site for site in _sample_sites(guide_trace) if not site["is_observed"]]
            drawn = {site["name"]: site["value"] for site in latents}
            with _Given(drawn), _AllocationCounter() as in_model:
                model_trace = poutine.trace(self.model).get_trace(*self.inputs)
        _check_latents_match(model_trace, guide_trace)
        frames = []
        for function, trace in (("guide", guide_trace), ("model", model_trace)):
            for site in _sample_sites(trace):
                self._check_site(function, site)
                frames += [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        self._nesting = max((-frame.dim for frame in frames), default=1)
        self.latent_shapes = {name: value.shape for name, value in drawn.items()}
        self._data_axes = {
            site["name"]: self._data_dim(site) - site["fn"].event_dim for site in latents
        }
        self.bytes_per_datum = max(1, in_model.bytes // self.num_data)
        self._guide_bytes_per_datum = max(1, in_guide.bytes // self.num_data)

    def _check_site(self, function: str, site: dict[str, Any]) -> None:
        name = site["name"]
        frames = [frame for frame in site["cond_indep_stack"] if frame.name == self.plate]
        if not frames or not frames[0].vectorized:
            kind = "observed site" if site["is_observed"] else "latent"
            raise InputError(
                f"expected {kind} {name!r} of the {function} inside the data plate "
                f"{self.plate!r}: a site that the data share has no weight per datum"
            )
        log_prob = site_log_prob(site)
        size = log_prob.shape[frames[0].dim] if log_prob.dim() >= -frames[0].dim else 1
        if size != self.num_data:
            raise InputError(
                f"expected site {name!r} of the {function} to have {self.num_data} data along "
                f"plate {self.plate!r}, got {size}: use pyro.plate({self.plate!r}, len(x))"
            )
        known = latent_scale_of(site)
        for frame in site["cond_indep_stack"]:
            if frame.full_size and frame.full_size > 0:
                known = known * frame.full_size / frame.size
        if not math.isclose(float(site["scale"]), float(known), rel_tol=1e-6):
            raise InputError(
                f"expected no scale on site {name!r} of the {function} but the plates', got "
                f"{float(site['scale']):g}: a weight can't be told from a poutine.scale; remove it"
            )


def site_log_prob(site: dict[str, Any]) -> Tensor:
    """Return a traced site's log-probability with its mask and without its scale."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def _sample_sites(trace: Trace) -> list[dict[str, Any]]:
    sites = trace.nodes.values()
    return [site for site in sites if site["type"] == "sample" and not site_is_subsample(site)]


def _sum_to(log_prob: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Sum over all but the kept (negative) dimensions, in float64."""
    others = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
    log_prob = log_prob.double()
    return log_prob.sum(others) if others else log_prob


def _check_latents_match(model_trace: Trace, guide_trace: Trace) -> None:
    in_model = {site["name"] for site in _sample_sites(model_trace) if not site["is_observed"]}
    in_guide = {site["name"] for site in _sample_sites(guide_trace) if not site["is_observed"]}
    missing = sorted(in_model - in_guide)
    if missing:
        raise InputError(
            f"expected a guide that draws every latent, {missing[0]!r} is missing: "
            "add pyro.sample for it, or observe it in the model"
        )
    auxiliary = {name for name in in_guide if guide_trace.nodes[name]["infer"].get("is_auxiliary")}
    surplus = sorted(in_guide - in_model - auxiliary)
    if surplus:
        raise InputError(
            f"expected latents of the guide to be the model's, {surplus[0]!r} is not: "
            'draw it in the model too, or mark it infer={"is_auxiliary": True}'
        )


def _stacked(rows: list[Any]) -> Any:
    """Stack equal structures of tensors (tuples, dicts) along a new first dimension."""
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.stack(rows)
    if isinstance(first, dict):
        return {name: _stacked([row[name] for row in rows]) for name in first}
    return tuple(_stacked([row[index] for row in rows]) for index in range(len(first)))


def _all_close(batched: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> bool:
    # Batched and plain kernels round differently (about 1e-6 of the sum of the terms in float32); a
    # particle that met another particle's or another datum's numbers is off by much more.
    return all(
        left.shape == right.shape
        and torch.allclose(left, right, rtol=1e-4, atol=1e-3, equal_nan=True)
        for left, right in zip(batched, plain, strict=True)
    )


class _Given(Messenger):
    """Give sample sites the values named here, as ``poutine.replay`` does from a trace."""

    def __init__(self, values: Latents) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.values and not message["is_observed"]:
            message["value"] = self.values[message["name"]]
            message["done"] = True


class _AllocationCounter(TorchDispatchMode):
    """Sum the bytes of every operation's results: an upper bound of the memory they need."""

    bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self.bytes += value.numel() * value.element_size()
        return result
