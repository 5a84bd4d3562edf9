"""Discrete latents that the model enumerates and the guide does not draw, summed out exactly."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError, first_line
from pyro_vae.pair.sites import Given, Latents, Site, latent_sites, site_log_prob, vectorized_frames


def summed_sites(model_trace: Trace, guide_trace: Trace) -> list[Site]:
    """Return the model's latents that Pyro enumerates in parallel, all values, and no guide draws."""
    return [
        site
        for site in latent_sites(model_trace)
        if site["name"] not in guide_trace.nodes
        and site["infer"].get("enumerate") == "parallel"
        and site["infer"].get("num_samples") is None
        and site["fn"].has_enumerate_support
    ]


def is_enumerated(site: Site) -> bool:
    """Tell whether a traced site holds all its values in place of a draw."""
    return site["infer"].get("_enumerate_dim") is not None


def enumerate_latents(model: Any, nesting: int, given: Latents) -> Any:
    """Return a model that enumerates, left of so many plates, what it marks and is not given."""
    return _Enumerate(first_available_dim=-1 - nesting)(Given(given)(model))


class _Enumerate(EnumMessenger):
    """Pyro's handler, which asks a value for its ``data``: ``torch.vmap`` has only the shape."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            msg["value"] = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample(msg)
        msg["value"] = value


def sum_out(trace: Trace, sites: Iterable[Site]) -> list[tuple[Site, Tensor]]:
    """Sum enumerated values out of a trace: log-probabilities whose sum is that of the sites.

    They are float64, each with a site in whose plates it is. Masks are kept and scales left out; one
    on what is summed out hides the data below it alone: its own probabilities sum to 1.

    Source:
        Obermeyer et al. 2019, "Tensor Variable Elimination for Plated Factor Graphs", algorithm 1.
    """
    if not hasattr(trace, "plate_to_symbol"):
        trace.symbolize_dims()
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    summed: set[str] = set()
    shown: dict[frozenset[str], Site] = {}
    for site in sites:
        plain = not is_enumerated(site)
        log_prob = site_log_prob(site) if plain else site["fn"].log_prob(site["value"])
        plates = frozenset(trace.plate_to_symbol[f.name] for f in vectorized_frames(site))
        term = packed.pack(log_prob.double(), site["infer"]["_dim_to_symbol"])
        tree.setdefault(plates, []).append(term)
        shown.setdefault(plates, site)
        summed |= set() if plain else {site["infer"]["_enumerate_symbol"]}
    try:
        contracted = contract_tensor_tree(tree, summed, ring=_Eliminate())
    except NotImplementedError as error:
        wanted, advice = "latents to sum out in plates nested like a tree", "draw them in the guide"
        raise InputError(f"expected {wanted}, got {first_line(error)}: {advice}") from error
    each = [(plates, term) for plates, terms in contracted.items() for term in terms]
    return [(shown[plates], packed.unpack(term, trace.symbol_to_dim)) for plates, term in each]


class _Eliminate(LogRing):
    """Sums one variable out after another; Pyro's own ring has a backward rule that vmap refuses."""

    def sumproduct(self, terms: Iterable[Any], dims: Iterable[str]) -> Any:
        terms, left = list(terms), set(dims)

        def cost(dim: str) -> tuple[int, str]:
            return len(set("".join(t._pyro_dims for t in terms if dim in t._pyro_dims))), dim

        while left:
            dim = min(left, key=cost)
            left.remove(dim)
            terms.append(_multiply([term for term in terms if dim in term._pyro_dims], dim))
            terms = [term for term in terms if dim not in term._pyro_dims]
        return _multiply(terms)


def _multiply(terms: list[Any], dim: str | None = None) -> Any:
    """Multiply packed tables of log-probabilities, and sum over one of their variables."""
    tables = packed.broadcast_all(*terms)
    dims, product = tables[0]._pyro_dims, sum(tables)
    if dim is not None:
        product, dims = product.logsumexp(dims.index(dim)), dims.replace(dim, "")
    product._pyro_dims = dims
    return product
