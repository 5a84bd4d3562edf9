"""What went wrong in a training run, read from its history and one look at the pair it left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.data_scale import describe_scale
from pyro_vae.infer.settings import FitSettings
from pyro_vae.pair.functions import PairFunction, evaluation_mode, owned_modules, seeded
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import draw_traces, innermost, is_inside, latent_sites, value_axis

_Rows = Sequence[Mapping[str, float]]
# Nats per latent unit below which nothing is coded: a unit whose posterior mean has a variance of
# 0.01, the usual test for an active one (Burda et al. 2016, appendix C), costs log(1.01) / 2 = 0.005;
# as much again for the noise of the steps.
_CODES_NOTHING = 0.01
# Epochs whose rate is averaged: the rate of one is that of one draw per datum.
_AVERAGED = 10
# An epoch's mean gradient norm over the median of those before. A learned sigma that falls from 0.7
# to a well-fitted 0.02 lets it grow by their ratio, 35, while the bound improves.
_EXPLODES = 100.0
# Learned sigma over the spread of the data: a model that explains all but 1e-4 of their variance has
# found data that don't vary, or learned them by heart.
_RUNS_AWAY = 0.01
# Data points whose scale is looked at.
_LOOKED_AT = 4096


def diagnose(
    rows: _Rows, model: PairFunction, guide: PairFunction, batch: Inputs, settings: FitSettings
) -> tuple[str, ...]:
    """Name what went wrong by the metrics per epoch, one line each, with what to try."""
    if not rows:
        return ()
    with seeded(0), evaluation_mode(model, guide):
        model_trace, guide_trace = draw_traces(model, guide, batch)
    found = _collapse(rows, guide_trace, settings), _explosion(rows), _sigma(rows, model_trace)
    wrong = [text for text in found if text]
    # What a VAE is given it can standardise; a pair of the user's own may do so inside.
    scale = unscaled(model, batch[0]) if wrong or _standardizers(model) else None
    return tuple([f"scale: {scale}", *wrong] if scale else wrong)


def unscaled(model: PairFunction, x: Tensor) -> str | None:
    """Say at what scale the data are and what to do, if it is far from 1 and nothing knows of it."""
    if not x.is_floating_point() or any(each.standardized for each in _standardizers(model)):
        return None
    return describe_scale(x[:_LOOKED_AT])


def _standardizers(model: PairFunction) -> list[Any]:
    parts = [getattr(owner, "likelihood", None) for owner in owned_modules(model)]
    return [part for part in parts if hasattr(part, "standardized")]


def _collapse(rows: _Rows, guide_trace: Trace, settings: FitSettings) -> str | None:
    after = rows[settings.warmup_epochs :]
    rate = float(np.mean([row["train_rate"] for row in after[-_AVERAGED:]])) if after else math.nan
    inside = [site for site in latent_sites(guide_trace) if is_inside(site, settings.plate)]
    shapes = [(s["value"].shape, value_axis(s, settings.plate)) for s in inside]
    units = sum(shape.numel() // shape[axis] for shape, axis in shapes)
    # Written so that a rate that is not a number says nothing.
    if not units or not abs(rate) < _CODES_NOTHING * units:
        return None
    which = "the one latent unit codes" if units == 1 else f"all {units} latent units together code"
    advice = "a longer warm-up (warmup_epochs), a smaller beta, free bits, or a weaker decoder"
    found = f"posterior collapse: {which} {rate:.2g} nats, so the model ignores its latents"
    return f"{found}; try {advice}"


def _explosion(rows: _Rows) -> str | None:
    norms = np.array([row["gradient_norm"] for row in rows])
    bounds = np.array([row["train_bound"] for row in rows])
    for epoch in range(1, len(rows)):
        before = float(np.median(norms[:epoch]))
        # A density that sharpens has steep gradients too, but a bound that gets better.
        if norms[epoch] > _EXPLODES * before > 0 and bounds[epoch] < bounds[:epoch].max():
            rose = f"exploding gradients: their norm rose to {norms[epoch]:.2g} in epoch {epoch + 1}"
            much = f"{norms[epoch] / before:,.0f} times the median before, and the bound fell"
            return f"{rose}, {much}; try a lower learning_rate, gradient_clip, or a schedule"
    return None


def _sigma(rows: _Rows, model_trace: Trace) -> str | None:
    for site in model_trace.nodes.values():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        # Of a location-scale family, where parameters decide it.
        scale, value = getattr(innermost(site["fn"]), "scale", None), site["value"]
        if not isinstance(scale, Tensor) or not scale.requires_grad or len(value) < 2:
            continue
        scale = scale.detach()
        # A scale for each value is compared with that value's own spread: columns may differ in unit.
        variance = value.double().var(0)
        is_shared = bool((scale == scale.flatten()[0]).all())
        spreads = (variance.mean() if is_shared else variance).sqrt().expand_as(scale).flatten()
        middle = (scale.flatten() / spreads).argsort()[len(spreads) // 2]
        sigma, spread = float(scale.flatten()[middle]), float(spreads[middle])
        if sigma < _RUNS_AWAY * spread:
            return (
                f"sigma runs to 0: at site {site['name']!r} it is {sigma:.2g}, the data's spread is "
                f"{spread:.2g}, and the distortion went from {rows[0]['train_distortion']:.4g} to "
                f"{rows[-1]['train_distortion']:.4g} nats; try a fixed sigma or a larger "
                "floor, noise on the data (dequantise them), and check the validation ELBO"
            )
    return None
