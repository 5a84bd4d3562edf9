"""The bridge to ArviZ: an estimate in the data structure of the installed line (0.23, or 1.x)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.options import check_counts
from pyro_vae.evaluation.pareto import PARETO_K_LIMIT

if TYPE_CHECKING:
    from pyro_vae.evaluation.estimate import LogMarginal, PosteriorDraws


def to_arviz(
    estimate: LogMarginal,
    *,
    num_draws: int = 1000,
    seed: int = 0,
    labels: Sequence[Any] | None = None,
) -> Any:
    """Return an estimate as ArviZ's ``InferenceData`` (0.23) or as a ``DataTree`` (1.x).

    Groups, all with the data as coordinate ``data``:

    - ``posterior``: the latents, resampled by their weights (chain, draw, data, ...);
    - ``log_likelihood``: log p(x given z) of these draws, as variable ``x`` (chain, draw, data);
    - ``sample_stats``: the log weights of these draws (chain, draw, data);
    - ``importance``: the log weights of all kept draws (sample, data), and the estimate per datum
      with its standard error, effective sample size and Pareto k.

    Each datum has latents of its own, so ``arviz.loo`` on the result is not predictive of new data:
    E[1 / p(x given z)] over the posterior is 1 / p(x), which makes it a (smoothed) harmonic mean
    estimate of log p(x), worse than the one in ``importance``.

    Args:
        estimate: what :func:`pyro_vae.log_marginal` returned.
        num_draws: posterior draws per datum.
        seed: seed of the resampling.
        labels: names of the data, N of them; by default their positions.

    Raises:
        InputError: no draws were kept, labels of another length, or a number of draws below 1.
    """
    draws = estimate.draws
    if draws is None:
        raise InputError("expected an estimate that kept draws, got none: use keep_draws=1000")
    check_counts(num_draws=num_draws)
    num_data = len(estimate.log_prob)
    names = list(range(num_data)) if labels is None else list(labels)
    if len(names) != num_data:
        raise InputError(f"expected {num_data} labels, one per datum, got {len(names)}")
    groups = _groups(estimate, draws, _resampled(draws.log_weights, num_draws, seed), names)
    return _structure(groups)


def pointwise_densities(log_prob: Tensor, pareto_k: Tensor, num_samples: int) -> Any:
    """Return log p(x) of data outside the training as ArviZ's pointwise predictive density.

    ``arviz.compare({name: densities, ...})`` takes it as it is: it ranks the models by the sum over
    the data, with differences and their paired standard errors, and ``arviz.plot_compare`` shows
    them. ArviZ calls such numbers ``elpd_loo``. Nothing is left out here, and nothing needs to be:
    the model has not seen the data, so log p(x) is their log predictive density. There is no
    effective number of parameters (``p`` is 0).

    ``arviz.compare``'s default, stacking, exponentiates each datum's log p(x); where that underflows
    (below about -700 nats) use ``method="pseudo-BMA"``.

    Args:
        log_prob: log p(x) per datum, ``(N,)``, nats.
        pareto_k: tail index of each datum's weights, ``(N,)``.
        num_samples: draws that ``log_prob`` rests on.
    """
    import arviz
    import xarray

    count = len(log_prob)
    per_datum = {
        name: xarray.DataArray(value.numpy(), dims="data", coords={"data": range(count)}, name=name)
        for name, value in (("elpd", log_prob), ("pareto_k", pareto_k))
    }
    error = math.sqrt(count) * log_prob.std(correction=0).item()
    heavy = bool((pareto_k > PARETO_K_LIMIT).any())
    numbers = {
        "elpd": log_prob.sum().item(),
        "se": error,
        "p": 0.0,
        "n_samples": num_samples,
        "n_data_points": count,
        "warning": heavy,
        "pareto_k": per_datum["pareto_k"],
        "scale": "log",
        "good_k": PARETO_K_LIMIT,
    }
    fields = getattr(arviz.ELPDData, "__dataclass_fields__", None)
    if fields is None:  # a pandas Series in the 0.x line
        old_names = {"elpd": "elpd_loo", "p": "p_loo"}
        renamed = {old_names.get(name, name): value for name, value in numbers.items()}
        renamed["loo_i"] = per_datum["elpd"]
        return arviz.ELPDData(list(renamed.values()), index=list(renamed))
    kind = {"kind": "loo"} if "kind" in fields else {}  # asked for until 1.2
    return arviz.ELPDData(**numbers, **kind, elpd_i=per_datum["elpd"])


def calibration_groups(ranks: dict[str, Any]) -> Any:
    """Return normalised ranks in ArviZ's group for simulation-based calibration, ``prior_sbc``.

    Args:
        ranks: by latent site, ``(M, D)`` in (0, 1).
    """
    import xarray

    variables = {
        name: (("chain", "draw", f"{name}_dim_0"), value[None]) for name, value in ranks.items()
    }
    sizes = {f"{name}_dim_0": range(value.shape[1]) for name, value in ranks.items()}
    count = len(next(iter(ranks.values())))
    coordinates = {"chain": [0], "draw": range(count), **sizes}
    return _structure({"prior_sbc": xarray.Dataset(variables, coords=coordinates)})


def _structure(groups: dict[str, Any]) -> Any:
    """Return groups in the data structure of the installed ArviZ."""
    import arviz

    # The 1.x line has xarray's DataTree under this name, or answers to it with a warning.
    old = vars(arviz).get("InferenceData")
    if old is None or hasattr(old, "from_dict"):
        from xarray import DataTree

        return DataTree.from_dict(groups)
    return old(**groups, warn_on_custom_groups=False)


def _resampled(log_weights: Tensor, num_draws: int, seed: int) -> Tensor:
    """Draw positions ``(num_draws, N)`` in proportion to the weights ``(S, N)``."""
    generator = torch.Generator().manual_seed(seed)
    # A datum whose every weight is 0 has no posterior to resample; its draws are left as they are.
    weights = log_weights.softmax(0).nan_to_num(nan=1.0)
    return torch.multinomial(weights.T, num_draws, replacement=True, generator=generator).T


def _groups(
    estimate: LogMarginal, draws: PosteriorDraws, chosen: Tensor, names: list[Any]
) -> dict[str, Any]:
    import xarray

    columns = torch.arange(chosen.shape[1])
    coordinates = {"chain": [0], "draw": list(range(len(chosen))), "data": names}

    def array(value: Tensor, name: str) -> Any:
        picked = value[chosen, columns][None]
        extra = [f"{name}_dim_{index}" for index in range(picked.dim() - 3)]
        return (("chain", "draw", "data", *extra), picked.numpy())

    def dataset(values: dict[str, Tensor]) -> Any:
        variables = {name: array(value, name) for name, value in values.items()}
        sizes = {
            dim: range(size)
            for dims, value in variables.values()
            for dim, size in zip(dims[3:], value.shape[3:], strict=True)
        }
        return xarray.Dataset(variables, coords={**coordinates, **sizes})

    per_datum = ("log_prob", "standard_error", "ess", "pareto_k")
    importance = xarray.Dataset(
        {
            "log_weight": (("sample", "data"), draws.log_weights.numpy()),
            **{name: (("data",), getattr(estimate, name).numpy()) for name in per_datum},
        },
        coords={"sample": list(range(len(draws.log_weights))), "data": names},
        attrs={"method": estimate.method, "unit": "nats"},
    )
    return {
        "posterior": dataset(draws.latents),
        "log_likelihood": dataset({"x": draws.log_likelihood}),
        "sample_stats": dataset({"log_weight": draws.log_weights}),
        "importance": importance,
    }
