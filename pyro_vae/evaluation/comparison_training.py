"""The pairs of a comparison: what is refused before any is trained, training, and a model held."""

import copy
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, check_name, whole_number
from pyro_vae.infer.settings import as_dict, check_callables
from pyro_vae.infer.training import FitResult, fit
from pyro_vae.pair import sites as traced
from pyro_vae.pair.contract import check_latents_match
from pyro_vae.pair.functions import PairFunction, device_of, evaluation_mode, owned_modules
from pyro_vae.pair.inputs import Inputs, as_inputs, check_data
from pyro_vae.pair.opened import OpenedPair, any_number_of_data
from pyro_vae.pair.sites import Given, TracePair
from pyro_vae.pair.state import accumulating_leaves

Pair = tuple[PairFunction, PairFunction]
Report = Callable[[str, str, float], None]
TrainingData = Dataset | Tensor | Sequence[Tensor]


class Trained(NamedTuple):
    """What trains of a pair, and what of that is its guide's: parameters by their identity."""

    parameters: dict[int, Tensor]
    of_guide: dict[int, Tensor]


class Observed(NamedTuple):
    """One observed site: its :func:`likelihood_kind`, and its values, data first, float64, CPU."""

    kind: str
    values: Tensor


def check_fit_options(fit_options: Mapping[str, Any] | None, *, trains: bool) -> dict[str, Any]:
    """Refuse names that :func:`pyro_vae.fit` does not know, and options where nothing is trained."""
    options = as_dict("fit_options", fit_options)
    known = set(inspect.signature(fit).parameters) - {"model", "guide", "data"}
    for name in options:
        check_name("fit option", name, known)
    if options and not trains:
        raise InputError("expected train with fit_options, got none: pass the training data")
    check_callables(on_epoch=options.get("on_epoch"))
    return options


def check_apart(pairs: Mapping[str, Pair], owned: Mapping[str, Trained], hold: str | None) -> None:
    """Refuse different pairs that would train the same parameters, one undoing the other."""
    for (name, pair), (other, its) in itertools.combinations(pairs.items(), 2):
        same = pair[1] == its[1] if hold == "model" else pair == its
        if not same and owned[name].parameters.keys() & owned[other].parameters.keys():
            wanted = "pairs that share no parameters to train"
            mend = "build each from networks and parameter names of its own, or train them beforehand"
            raise InputError(f"expected {wanted}, got shared ones of {name!r} and {other!r}: {mend}")


def check_training(pairs: Iterable[Pair], train: TrainingData, options: Any, plate: str) -> None:
    """Refuse training data that one of the pairs does not take: all before anything is trained."""
    drawn_anew = isinstance(train, Dataset) and train.binarize == "dynamic"
    inputs = as_inputs(train.train if isinstance(train, Dataset) else train)
    batch_size = whole_number("a batch size", options.get("batch_size", 128), least=1)  # fit's own
    batch = tuple(value[:batch_size] for value in inputs)
    for model, guide in pairs:
        check_data(model, inputs)
        if drawn_anew or options.get("transform") is not None:
            continue  # the pair is shown other values than these
        pair = OpenedPair(model, guide, as_inputs(batch, model, guide), plate=plate)
        with any_number_of_data("pair", pair.num_data), pair.evaluating(0):
            pass  # its structure has been looked at


def observed_sites(pair: OpenedPair) -> tuple[dict[str, Observed], TracePair]:
    """Return what an open pair observes by site (factors left out), and its first block's traces."""
    found: dict[str, list[Observed]] = {}
    first: TracePair | None = None
    for _, part in pair.blocks():
        traces = part.trace()
        first = first or traces
        for site in map(traces[0].nodes.get, traced.observed_names(traces[0])):
            values = site["value"].detach().movedim(traced.value_axis(site, pair.plate), 0)
            seen = Observed(traced.likelihood_kind(site), values.double().cpu())
            found.setdefault(site["name"], []).append(seen)
    assert first is not None  # data are never empty
    return {name: _join(blocks) for name, blocks in found.items()}, first


def check_comparable(observed: dict[str, dict[str, Observed]]) -> str:
    """Refuse pairs, by name, whose log-likelihoods can't be subtracted; return their kind."""
    (first, reference), *others = observed.items()
    for name, sites in others:
        if len(sites) != len(reference):
            what = "pairs that observe the same data"
            found_ = f"{len(reference)} observed sites of {first!r} and {len(sites)} of {name!r}"
            raise InputError(f"expected {what}, got {found_}: compare models of one data set")
        # Names are free; where they differ the sites are taken in the order of the model.
        matched = set(sites) == set(reference)
        for index, (site, wanted) in enumerate(reference.items()):
            got = sites[site] if matched else list(sites.values())[index]
            _check_site(site, first, wanted, name, got)
    return " and ".join(sorted({site.kind for site in reference.values()}))


def _check_site(site: str, first: str, wanted: Observed, name: str, got: Observed) -> None:
    # The same number may have been rounded to another type by each pair.
    what = None
    if wanted.values.shape != got.values.shape:
        what = f"shapes {tuple(wanted.values.shape)} and {tuple(got.values.shape)}"
    elif not torch.allclose(wanted.values, got.values, rtol=1e-6, atol=1e-6, equal_nan=True):
        what = "other values"
    if what is not None:
        raise InputError(
            f"expected pairs that observe the same values, got {what} at {site!r} of {first!r} and "
            f"{name!r}: compare models of the same data, scaled and shaped alike"
        )
    if wanted.kind != got.kind:
        raise InputError(
            f"expected pairs with one kind of likelihood, got a {wanted.kind} of {site!r} from "
            f"{first!r} and a {got.kind} from {name!r}: their log p(x) can't be subtracted, compare "
            "them in separate tables"
        )


def _join(blocks: list[Observed]) -> Observed:
    kinds = {block.kind for block in blocks}
    kind = "pseudo-likelihood" if "pseudo-likelihood" in kinds else blocks[0].kind
    return Observed(kind, torch.cat([block.values for block in blocks]))


def train_pairs(
    pairs: Mapping[str, Pair], train: TrainingData, options: dict[str, Any], report: Report
) -> dict[str, FitResult]:
    """Train each pair once, however many names it has."""
    fits: dict[str, FitResult] = {}
    for name, pair in pairs.items():
        same = next((other for other in fits if pairs[other] == pair), None)
        if same is not None:
            fits[name] = fits[same]
            continue

        def on_epoch(epoch: int, row: dict[str, float], name: str = name) -> None:
            report(name, "training", epoch / options.get("epochs", 100))
            if options.get("on_epoch") is not None:
                options["on_epoch"](epoch, row)

        fits[name] = fit(*pair, train, **{**options, "on_epoch": on_epoch})
    return fits


@contextmanager
def frozen_model(
    model: PairFunction, guides: Mapping[str, PairFunction], inputs: Inputs, device: torch.device
) -> Iterator[PairFunction]:
    """Yield the model with nothing in it that trains, in eval mode, on a device.

    A module, or the owner of a method, is copied with what it takes from the guide's side (the family
    under a VampPrior); parameters of a plain function are frozen in place and given back afterwards.
    """
    owners, run = owned_modules(model), model

    def fixed(*inputs: Tensor) -> Any:  # nobody trains or moves the module that it belongs to
        return run(*inputs)

    if owners:
        run = _rebind(model, copy.deepcopy(owners[0]).to(device).eval().requires_grad_(False))
        _check_frozen(fixed, guides, inputs)
        yield fixed
        return
    parameters = _parameters_of(model, inputs)
    for name, guide in guides.items():
        if parameters.keys() & _parameters_of(guide, inputs).keys():
            raise _shared(name)
    trained = [leaf for leaf in parameters.values() if leaf.requires_grad]
    try:
        for leaf in trained:
            leaf.requires_grad_(False)
        # pyro.module warns of frozen parameters in a module that is in training mode.
        with evaluation_mode(model):
            _check_frozen(fixed, guides, inputs)
            yield fixed
    finally:
        for leaf in trained:
            leaf.requires_grad_(True)


def parameters_in(trace: Trace) -> dict[int, Tensor]:
    """Return the parameters that a traced function names to Pyro, unconstrained, by identity."""
    sites = [site for site in trace.nodes.values() if site["type"] == "param"]
    return {id(leaf): leaf for leaf in (site["value"].unconstrained() for site in sites)}


def _parameters_of(function: PairFunction, inputs: Inputs) -> dict[int, Tensor]:
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        function(*inputs)
    return parameters_in(capture.trace)


def _rebind(function: PairFunction, twin: nn.Module) -> PairFunction:
    """Return the function with its owner replaced."""
    if isinstance(function, functools.partial):
        return functools.partial(_rebind(function.func, twin), *function.args, **function.keywords)
    if isinstance(function, types.MethodType):
        return types.MethodType(function.__func__, twin)
    return twin


def _check_frozen(fixed: PairFunction, guides: Mapping[str, PairFunction], inputs: Inputs) -> None:
    """Refuse a model that depends on something to be trained, and guides of other latents."""
    device = inputs[0].device
    for name, guide in guides.items():
        # A guide that is yet to be trained may still be elsewhere.
        place = device_of(guide, default=device)
        with torch.no_grad():
            drawn = poutine.trace(guide).get_trace(*(value.to(place) for value in inputs))
        values = {site["name"]: site["value"].to(device) for site in traced.latent_sites(drawn)}
        with torch.enable_grad(), Given(values):
            trace = poutine.trace(fixed).get_trace(*inputs)
            check_latents_match(trace, drawn)
            terms = [site["fn"].log_prob(site["value"]) for site in traced.sample_sites(trace)]
        leaves = {id(leaf) for leaf in accumulating_leaves(*terms)}
        if leaves & parameters_in(drawn).keys():
            raise _shared(name)
        if leaves:
            wanted = "a model to freeze whose trainable tensors Pyro knows"
            advice = "register their modules with pyro.module, or call requires_grad_(False) on them"
            raise InputError(f"expected {wanted}, got unknown ones: {advice}")


def _shared(name: str) -> InputError:
    wanted = f"a model to freeze that shares no parameters with the guide of {name!r}"
    advice = "give the model as a method of the module that owns both, or separate them"
    return InputError(f"expected {wanted}, got shared ones: {advice}")
