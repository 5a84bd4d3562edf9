"""The bridge to ArviZ: numbers in the data structure of the installed line (0.23, or 1.x)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.pareto import PARETO_K_LIMIT


def resampled_posterior(
    latents: Mapping[str, Tensor],
    log_likelihood: Tensor,
    log_weights: Tensor,
    per_datum: Mapping[str, Tensor],
    *,
    method: str,
    num_draws: int,
    seed: int,
    labels: Sequence[Any] | None,
) -> Any:
    """Return weighted draws in ArviZ's groups; :func:`pyro_vae.evaluation.to_arviz` describes them.

    Latents are ``(S, N, ...)``, log likelihood and log weights ``(S, N)`` in nats, and the further
    numbers of each data point ``(N,)``.
    """
    import xarray

    check_counts(num_draws=num_draws)
    num_data = log_weights.shape[1]
    names = list(range(num_data)) if labels is None else list(labels)
    if len(names) != num_data:
        raise InputError(f"expected {num_data} labels, one per datum, got {len(names)}")
    chosen = _resample(log_weights, num_draws, seed)
    importance = xarray.Dataset(
        {
            "log_weight": (("sample", "data"), log_weights.numpy()),
            **{name: (("data",), value.numpy()) for name, value in per_datum.items()},
        },
        coords={"sample": list(range(len(log_weights))), "data": names},
        attrs={"method": method, "unit": "nats"},
    )
    return _structure(
        {
            "posterior": _chosen_draws(latents, chosen, names),
            "log_likelihood": _chosen_draws({"x": log_likelihood}, chosen, names),
            "sample_stats": _chosen_draws({"log_weight": log_weights}, chosen, names),
            "importance": importance,
        }
    )


def pointwise_densities(log_prob: Tensor, pareto_k: Tensor, num_samples: int) -> Any:
    """Return log p(x) of data outside the training as ArviZ's pointwise predictive density.

    ``arviz.compare({name: densities, ...})`` takes it as it is: it ranks the models by the sum over
    the data, with differences and their paired standard errors, and ``arviz.plot_compare`` shows
    them. ArviZ calls such numbers ``elpd_loo``. Nothing is left out here, and nothing needs to be:
    the model has not seen the data, so log p(x) is their log predictive density. There is no
    effective number of parameters (``p`` is 0).

    ``arviz.compare``'s default, stacking, exponentiates each datum's log p(x); where that underflows
    (below about -700 nats) use ``method="pseudo-BMA"``.
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
    """Return normalised ranks ``(M, D)`` by site in ArviZ's group for calibration, ``prior_sbc``."""
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


def _resample(log_weights: Tensor, num_draws: int, seed: int) -> Tensor:
    """Draw positions ``(num_draws, N)`` in proportion to the weights ``(S, N)``."""
    generator = torch.Generator().manual_seed(seed)
    # A datum whose every weight is 0 has no posterior to resample; its draws are left as they are.
    weights = log_weights.softmax(0).nan_to_num(nan=1.0)
    return torch.multinomial(weights.T, num_draws, replacement=True, generator=generator).T


def _chosen_draws(values: Mapping[str, Tensor], chosen: Tensor, names: list[Any]) -> Any:
    """Return the draws ``(S, N, ...)`` at the chosen positions, with their coordinates."""
    import xarray

    variables: dict[str, Any] = {}
    coordinates: dict[str, Any] = {"chain": [0], "draw": list(range(len(chosen))), "data": names}
    for name, value in values.items():
        picked = value[chosen, torch.arange(chosen.shape[1])][None]
        sizes = {f"{name}_dim_{index}": range(size) for index, size in enumerate(picked.shape[3:])}
        variables[name] = (("chain", "draw", "data", *sizes), picked.numpy())
        coordinates |= sizes
    return xarray.Dataset(variables, coords=coordinates)
