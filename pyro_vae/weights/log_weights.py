"""The importance weight p(x, z) / q(z given x): one definition for every estimator.

The guide is drawn for all particles under an outer plate (so an encoder runs once per datum), and the
drawn latents are scored under the model for all particles at once (see :mod:`.particles`). Every
shortcut is checked against plain calls before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError, whole_number
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, device_of
from pyro_vae.pair.inputs import Inputs, as_inputs, check_support
from pyro_vae.pair.sites import (
    Given,
    Latents,
    check_latents_match,
    check_rows,
    check_site,
    data_dim,
    draw_traces,
    is_delta,
    is_inside,
    latent_sites,
    sample_sites,
    site_log_prob,
    sum_to,
)
from pyro_vae.weights.particles import (
    AllocationCounter,
    GivenScore,
    agree,
    first_faithful,
    stacked,
    tile,
    total,
    untile,
)


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
    num_samples = whole_number("num_samples", num_samples, least=1)
    inputs = as_inputs(x, model, guide)
    check_support(model, inputs)
    with HANDLER_LOCK:
        scores = PairScorer(model, guide, inputs, plate=plate).draw(num_samples)
    check_weights(scores)
    return scores.log_weights


class PairScorer:
    """A pair bound to its data: draws latents from the guide and scores them under both.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        inputs: tensors that share their first dimension N.
        plate: name of the data plate.

    Attributes:
        num_data: number of data, N.
        latent_shapes: shape of each latent for one particle.
        data_axes: for each latent, the (negative) axis of its value that counts the data.
        bytes_per_datum: memory that scoring one particle of one datum allocates, an upper bound.

    Raises:
        InputError: a pair that can't be weighed rightly.
    """

    def __init__(
        self, model: PairFunction, guide: PairFunction, inputs: Inputs, *, plate: str = "data"
    ) -> None:
        # Data too large for the pair's device come from elsewhere, block by block.
        place = device_of(model, guide, default=inputs[0].device)
        inputs = tuple(value.to(place) for value in inputs)
        self.model, self.guide, self.inputs, self.plate = model, guide, inputs, plate
        self.num_data = len(inputs[0])
        self._drawn_by: Callable[[int], tuple[Latents, Tensor]] | None = None
        self._inspect()
        self.under_model = GivenScore(model, "model", inputs, plate, self.data_axes)
        self.under_guide = GivenScore(guide, "guide", inputs, plate, self.data_axes)

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

    def propose_from_prior(self, num_samples: int) -> Latents:
        """Draw latents from the model's prior, each ``(num_samples, *shape of one draw)``."""
        rows = []
        for _ in range(num_samples):
            trace = poutine.trace(self.model).get_trace(*self.inputs)
            rows.append({site["name"]: site["value"] for site in latent_sites(trace)})
        latents: Latents = stacked(rows)
        return latents

    def score(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Score latents ``(num_samples, ...)`` under the model.

        Returns:
            log p(x given z) and log p(z), each ``(num_samples, N)``.
        """
        return self.under_model(latents)

    def score_proposal(self, latents: Latents) -> Tensor:
        """Score latents ``(num_samples, ...)`` under the guide: log q ``(num_samples, N)``."""
        observed, latent = self.under_guide(latents)
        return observed + latent

    def traces(self) -> tuple[Trace, Trace]:
        """Run the guide, then the model on its draws, plainly: (model trace, guide trace)."""
        return draw_traces(self.model, self.guide, self.inputs)

    def bytes_per_proposal(self) -> int:
        """Return the bytes that one more particle per datum needs in :meth:`propose`."""
        if self._drawing() == self._propose_under_plate:
            elements = sum(math.prod(shape) for shape in self.latent_shapes.values())
            return max(1, 4 * self.inputs[0].element_size() * elements)
        return self.num_data * self._guide_bytes_per_datum

    # Drawing from the guide.

    def _drawing(self) -> Callable[[int], tuple[Latents, Tensor]]:
        if self._drawn_by is None:
            self._drawn_by = first_faithful(
                {self._propose_under_plate: 4, self._propose_tiled: 8},
                self._proposal_is_faithful,
                self._propose_plain,
                "guide",
            )
        return self._drawn_by

    def _propose_plain(self, num_samples: int) -> tuple[Latents, Tensor]:
        return stacked([self._propose_one() for _ in range(num_samples)])

    def _propose_one(self) -> tuple[Latents, Tensor]:
        trace = poutine.trace(self.guide).get_trace(*self.inputs)
        latents = {name: trace.nodes[name]["value"] for name in self.latent_shapes}
        return latents, total(sample_sites(trace), self.plate, self.inputs)

    def _propose_under_plate(self, num_samples: int) -> tuple[Latents, Tensor]:
        particles = pyro.plate("_particles", num_samples, dim=-self._nesting - 1)
        with particles, pyro.validation_enabled(False):
            trace = poutine.trace(self.guide).get_trace(*self.inputs)
        latents = {
            name: trace.nodes[name]["value"].reshape(num_samples, *shape)
            for name, shape in self.latent_shapes.items()
        }
        terms = [
            sum_to(site_log_prob(site), (-self._nesting - 1, data_dim(site, self.plate)))
            for site in sample_sites(trace)
        ]
        return latents, torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def _propose_tiled(self, num_samples: int) -> tuple[Latents, Tensor]:
        inputs = tile(self.inputs, num_samples)
        trace = poutine.trace(self.guide).get_trace(*inputs)
        latents = {
            name: untile(trace.nodes[name]["value"], axis, num_samples)
            for name, axis in self.data_axes.items()
        }
        log_proposal = total(sample_sites(trace), self.plate, inputs)
        return latents, log_proposal.view(num_samples, self.num_data)

    def _proposal_is_faithful(
        self, propose: Callable[[int], tuple[Latents, Tensor]], count: int
    ) -> bool:
        """Compare batched draws with plain calls that are given the same random values."""
        latents, log_proposal = propose(count)
        # A point mass follows from the other sites; given a value that was rounded differently it
        # would report a density of 0.
        random = {n: value for n, value in latents.items() if n not in self._point_masses}

        def plain(given: Latents) -> tuple[Tensor, ...]:
            rows = []
            for index in range(count):
                with Given({name: value[index] for name, value in given.items()}):
                    rows.append(self._propose_one())
            plain_latents, plain_log_proposal = stacked(rows)
            return (plain_log_proposal, *plain_latents.values())

        return agree((log_proposal, *latents.values()), plain, random)

    def _inspect(self) -> None:
        """Run the pair once, plainly, and refuse what can't be weighed rightly."""
        with torch.no_grad():
            with AllocationCounter() as in_guide:
                guide_trace = poutine.trace(self.guide).get_trace(*self.inputs)
            latents = latent_sites(guide_trace)
            for site in latents:
                if is_inside(site, self.plate):  # the model can't be given more data or fewer
                    check_rows("guide", site, self.plate, self.num_data)
            drawn = {site["name"]: site["value"] for site in latents}
            with Given(drawn), AllocationCounter() as in_model:
                model_trace = poutine.trace(self.model).get_trace(*self.inputs)
        if not latents:
            raise InputError("expected a guide that draws a latent, got none: add pyro.sample to it")
        check_latents_match(model_trace, guide_trace)
        frames = []
        for function, trace in (("guide", guide_trace), ("model", model_trace)):
            for site in sample_sites(trace):
                check_site(function, site, self.plate, self.num_data)
                frames += [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        if not any(site["is_observed"] for site in sample_sites(model_trace)):
            raise InputError(
                "expected a model that observes data, got none observed: pass obs= to pyro.sample, "
                "and the model before the guide"
            )
        self._nesting = max((-frame.dim for frame in frames), default=1)
        self.latent_shapes = {name: value.shape for name, value in drawn.items()}
        self.data_axes = {
            site["name"]: data_dim(site, self.plate) - site["fn"].event_dim for site in latents
        }
        self._point_masses = {site["name"] for site in latents if is_delta(site["fn"])}
        self.bytes_per_datum = max(1, in_model.bytes // self.num_data)
        self._guide_bytes_per_datum = max(1, in_guide.bytes // self.num_data)


def check_weights(scores: Scores) -> None:
    """Refuse weights that are NaN or infinite, naming the term that made them so."""
    weights = scores.log_weights
    if not (weights.isnan() | weights.isposinf()).any():
        return
    terms = {
        "log p(x|z)": (scores.log_likelihood, 1),
        "log p(z)": (scores.log_prior, 1),
        "log q(z|x)": (scores.log_proposal, -1),
    }
    for name, (term, sign) in terms.items():
        for kind, bad in (("NaN", term.isnan()), ("infinity", (sign * term).isposinf())):
            if bad.any():
                raise InputError(
                    f"expected finite log-probabilities, got {kind} in {name} for "
                    f"{int(bad.any(0).sum())} of {weights.shape[1]} data: look for NaN parameters, "
                    "a log of a negative number or a scale of 0"
                )
