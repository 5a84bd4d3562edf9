"""A model, a guide and their inputs opened once: run, cut into parts, and what one look shows."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple, Self

import pyro
import torch
from pyro import poutine
from pyro.distributions import validation_enabled
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.errors import InputError, first_line
from pyro_vae.pair import contract, functions
from pyro_vae.pair import sites as traced
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.enumeration import enumerate_latents, sum_out, summed_sites
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction
from pyro_vae.pair.inputs import Data, Inputs, as_inputs, check_data, take_rows, tile_inputs
from pyro_vae.pair.precision import compute_in
from pyro_vae.pair.sites import Given, Latents, Site, TracePair
from pyro_vae.pair.state import RunObserver, Snapshot, with_submodules

# Data points that are inspected, and that a block of an evaluation holds at most unless it says
# otherwise: enough to fill the arithmetic units, few enough that many particles fit beside them.
BLOCK = 1024

# Bytes of a chunk. On a CPU larger tensors than this leads to (32 MiB) are mapped anew by the C
# library for every operation, which costs more than their arithmetic. Constants, not what happens to
# be free: chunks decide which draws a seed gives, and what is compiled.
_CPU_MEMORY, _CUDA_MEMORY = 1 << 27, 1 << 32

# Data points of a trial: few, and enough for statistics over them to differ from those of a half.
_TRIED = 64

Progress = Callable[[int, int], None]


class Latent(NamedTuple):
    """What is known of a latent site."""

    axis: int  # the (negative) axis of its value that counts the data; what they share gets one
    shape: torch.Size  # of one draw for the data points that were inspected
    is_shared: bool  # whether it stands outside the data plate
    family: str  # name of the distribution that the guide draws it from
    is_point_mass: bool  # whether the guide places it by the other sites
    is_reparameterized: bool  # whether its draws carry a gradient
    is_enumerated: bool  # whether Pyro may sum over its values in place of drawing it

    @classmethod
    def of(cls, site: Site, plate: str | None) -> Self:
        """Describe a traced site of the guide."""
        fn, value, is_shared = site["fn"], site["value"], not traced.is_inside(site, plate)
        value = value[None] if is_shared else value
        axis = -value.dim() if is_shared else traced.value_axis(site, plate)
        kind = type(fn).__name__, traced.is_delta(fn), bool(fn.has_rsample)
        return cls(axis, value.shape, is_shared, *kind, bool(site["infer"].get("enumerate")))

    def shape_for(self, num_data: int) -> torch.Size:
        """Return the shape of one draw for this many data points."""
        shape = list(self.shape)
        shape[self.axis] = 1 if self.is_shared else num_data
        return torch.Size(shape)


class Structure(NamedTuple):
    """What one look at a pair shows; it holds for any of its data."""

    latents: dict[str, Latent]  # the guide's, by name, in its order
    nesting: int  # depth of the plates
    bytes_per_datum: int  # that one particle allocates under the model, at most
    guide_bytes_per_datum: int
    full_size: int  # how many data points the data plate stands for
    shares: bool  # whether sites stand outside it
    summed: frozenset[str]  # the model's latents that are summed out
    reads_values: frozenset[str]  # which of "model" and "guide" read tensors' values in Python
    precision: float  # relative spacing of the numbers of its densities, the coarsest
    likelihoods: frozenset[str]  # of the observed sites, see :func:`likelihood_kind`
    why_unweighable: str | None  # why it has no weight per data point, though it may be trained


@dataclass
class Knowledge:
    """What has been found out about a pair; shared by its parts, and holds none of its data."""

    structure: Structure | None = None
    ways: dict[str, str] = field(default_factory=dict)  # of drawing and scoring many particles
    is_divisible: bool | None = None  # whether it takes any part of its data
    is_stable: bool = False  # whether its latents were seen to be the same in several runs
    whole: int | None = None  # data points of the whole set, where it was opened on a part


def open_pair(
    model: PairFunction, guide: PairFunction, x: Data, *, plate: str | None = "data",
    serves: Serves = Serves.NOTHING,
) -> "OpenedPair":  # fmt: skip
    """Open a pair: its inputs on its device and in its type, checked; nothing runs yet."""
    inputs = as_inputs(x, model, guide, share_rows=plate is not None)
    check_data(model, inputs)
    return OpenedPair(model, guide, inputs, plate=plate, serves=serves)


def open_function(function: PairFunction, x: Data, *, plate: str = "data") -> "OpenedFunction":
    """Open a model or a guide alone; ``x`` are its conditions, so their values are not checked."""
    _check_plate(plate, Serves.NOTHING)
    return OpenedFunction(function, as_inputs(x, function), plate)


def _check_plate(plate: str | None, serves: Serves) -> None:
    if plate is None and Serves.WHOLE not in serves:
        raise InputError(
            "expected the name of the data plate, got plate=None: what is asked for is of each data "
            "point, and fit, log_weights and log_marginal alone take all of them as one"
        )


class OpenedFunction(NamedTuple):
    """A model or a guide alone with its inputs: it is run, and its densities are not weighed."""

    function: PairFunction
    inputs: Inputs
    plate: str | None

    @property
    def num_data(self) -> int:
        """Number of data points, N."""
        return len(self.inputs[0])

    @contextmanager
    def evaluating(self, seed: int | None = None, *others: PairFunction | None) -> Iterator[None]:
        """Hold the lock, in eval mode (also the others), without gradients, under a seed."""
        known = [self.function, *(other for other in others if other is not None)]
        place = functions.device_of(self.function, default=self.inputs[0].device)
        modes, precise = functions.evaluation_mode(*known), compute_in("float32", place)
        with HANDLER_LOCK, torch.no_grad(), modes, functions.seeded(seed), precise:
            yield

    def trace(self, *, explain: str | None = None) -> Any:
        """Run the function; ``explain`` names it where N is not what its user gave it."""
        with any_number_of_data(explain, self.num_data) if explain else nullcontext():
            return poutine.trace(self.function).get_trace(*self.inputs)

    def repeat(self, count: int) -> Self:
        """Return the function of all data points repeated, repetitions outermost."""
        return self._replace(inputs=tile_inputs(self.inputs, count))

    def first(self) -> Self:
        """Return the function of the first data point alone."""
        return self._replace(inputs=tuple(value[:1] for value in self.inputs))


@dataclass(eq=False)
class OpenedPair:
    """A model and a guide with the arguments that both are called with."""

    model: PairFunction
    guide: PairFunction
    arguments: tuple[Any, ...]  # for all but training tensors that share their first dimension, N
    keywords: dict[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    plate: str | None = "data"  # None: all the data are one datum, which has no parts
    serves: Serves = Serves.NOTHING  # what is taken besides latents of each data point alone
    knowledge: Knowledge = field(default_factory=Knowledge)  # found out so far, shared by its parts

    def __post_init__(self) -> None:
        _check_plate(self.plate, self.serves)

    @property
    def inputs(self) -> Inputs:
        """The arguments of a pair that was opened on data."""
        return self.arguments

    @property
    def num_data(self) -> int:
        """Number of data points, N."""
        return 1 if self.plate is None else len(self.arguments[0])

    @property
    def device(self) -> torch.device:
        """Where the pair computes."""
        return functions.device_of(self.model, self.guide, default=self.arguments[0].device)

    def memory(self, most: int | None = None) -> int:
        """Return the bytes that a chunk of work may need: ``most``, or what suits the device."""
        if most is not None or self.device.type == "cpu":
            return most or _CPU_MEMORY
        return min(_CUDA_MEMORY, torch.cuda.get_device_properties(self.device).total_memory // 4)

    @contextmanager
    def evaluating(self, seed: int | None = None, *others: PairFunction) -> Iterator[None]:
        """Hold the lock, in eval mode (also the others), without gradients, under a seed."""
        with self.alone(self.model).evaluating(seed, self.guide, *others):
            self.structure  # noqa: B018 (refuses a pair before anything is drawn)
            yield

    @contextmanager
    def training(self, seed: int | None = None) -> Iterator[None]:
        """Hold the lock, in training mode, with gradients, under a seed of its own."""
        with HANDLER_LOCK, functions.seeded(seed), functions.training_mode(self.model, self.guide):
            yield

    def trace(self, *, sum_out: bool = False) -> TracePair:
        """Run the guide, then the model on its draws, plainly: (model trace, guide trace).

        ``sum_out``: where the model enumerates latents that no guide draws, it holds all values.
        """
        traces = traced.draw_traces(self.model, self.guide, self.arguments, self.keywords)
        return (self._enumerate(traces), traces[1]) if sum_out and summed_sites(*traces) else traces

    def _enumerate(self, traces: TracePair) -> Trace:
        run = poutine.trace(enumerate_latents(self.model, _nesting(traces), _values_of(traces[1])))
        return run.get_trace(*self.arguments, **self.keywords)

    @property
    def axes(self) -> dict[str, int]:
        """For each latent, the (negative) axis of its value that counts the data points."""
        return {name: latent.axis for name, latent in self.structure.latents.items()}

    def on(self, inputs: Inputs) -> Self:
        """Return the pair with other inputs in place of its own: it is not looked at again."""
        return replace(self, arguments=inputs, keywords={})

    def alone(self, function: PairFunction) -> OpenedFunction:
        """Return one of the two functions with the pair's inputs."""
        return OpenedFunction(function, self.inputs, self.plate)

    def part(self, rows: slice | Tensor = slice(None)) -> Self:
        """Return the pair of some of the data points, on the device that it computes on."""
        rows = slice(None) if self.plate is None else rows
        return replace(self, arguments=take_rows(self.inputs, rows, self.device))

    def split(self, size: int = BLOCK) -> list[slice]:
        """Cut the data into blocks of equal size (the last may be smaller), if they may be."""
        count = -(-self.num_data // size) if self.num_data <= size or self.is_divisible() else 1
        size = -(-self.num_data // count)
        return [slice(start, start + size) for start in range(0, self.num_data, size)]

    def blocks(
        self, size: int = BLOCK, progress: Progress | None = None
    ) -> Iterator[tuple[slice, Self]]:
        """Yield the rows and the pair of each block; ``progress`` is told when one is done."""
        for rows in self.split(size):
            yield rows, self.part(rows)
            if progress is not None:
                progress(min(rows.stop, self.num_data), self.num_data)

    def few(self, most: int) -> Self:
        """Return the pair of a few data points to look at; of all where it takes no part of them."""
        return self.part(self.split(most)[0])

    def is_divisible(self) -> bool:
        """Show by a trial whether a data point gets the same values whatever stands beside it."""
        if self.knowledge.is_divisible is None:
            self.knowledge.is_divisible = self._try_out()
        return self.knowledge.is_divisible

    def takes_any_batch(self) -> bool:
        """Tell whether a data point gets the same values in any place, if not in any company."""
        return self.is_divisible() or self._try_out(in_any_company=False)

    def _try_out(self, *, in_any_company: bool = True) -> bool:
        with self._aside():
            return self.num_data > 2 and _gives_own_values(self, in_any_company=in_any_company)

    @property
    def structure(self) -> Structure:
        """What one look at the pair shows; found at the first use, which may refuse the pair."""
        if self.knowledge.structure is None:
            with self._aside():
                looked_at = self.few(BLOCK)
                self.knowledge.structure = looked_at.inspect(looked_at.num_data, rest=self.inputs)
        return self.knowledge.structure

    def is_pseudo_likelihood(self) -> bool:
        """Tell whether the model scores values that its discrete distribution can't take.

        The first block of the data has been looked at; the others are until one has such a value.
        """
        kinds = self.structure.likelihoods
        if "probability" in kinds and "pseudo-likelihood" not in kinds:
            with self._aside():
                for rows in self.split()[1:]:
                    kinds |= _likelihood_kinds(self.part(rows).trace()[0])
                    if "pseudo-likelihood" in kinds:
                        break
        return "pseudo-likelihood" in kinds

    def inspect(
        self, num_data: int | None = None, *, may_subsample: bool = False, rest: Inputs = ()
    ) -> Structure:
        """Run the pair once, plainly; refuse what breaks the contract.

        The data plate must hold ``num_data`` (None: as many as it says), or some of them where it
        ``may_subsample``; ``rest`` are all the data, if these are their first rows only.
        """
        guide_trace, in_guide = self._look_at(self.guide)
        contract.check_devices("guide", guide_trace, self.device)
        if may_subsample and traced.subsamples(guide_trace, self.plate):
            num_data = None
        if num_data is not None:
            self._check_rows("guide", guide_trace, num_data)
        try:
            with Given(_values_of(guide_trace)):
                model_trace, in_model = self._look_at(self.model)
        except traced.CALLING_ERRORS:
            if num_data is not None:  # of another number of data points than the guide's?
                self._check_rows("model", self.alone(self.model).trace(), num_data)
            raise
        contract.check_devices("model", model_trace, self.device)
        contract.check_pair(model_trace, guide_trace, self.plate, num_data, self.serves)
        contract.check_rest(model_trace, self.arguments, rest or self.arguments)
        latents = traced.latent_sites(guide_trace)
        sites = traced.sample_sites(guide_trace) + traced.sample_sites(model_trace)
        frames = [frame for site in sites for frame in traced.vectorized_frames(site)]
        own = next((frame for frame in frames if frame.name == self.plate), None)
        rows = 1 if own is None else max(1, own.size)
        summed = frozenset(site["name"] for site in summed_sites(model_trace, guide_trace))
        if summed:
            with RunObserver() as in_model:
                trace = self._enumerate((model_trace, guide_trace))
                sum_out(trace, traced.sample_sites(trace))
        observers = {"guide": in_guide, "model": in_model}
        return Structure(
            latents={site["name"]: Latent.of(site, self.plate) for site in latents},
            nesting=_nesting((model_trace, guide_trace)),
            bytes_per_datum=max(1, in_model.bytes // rows),
            guide_bytes_per_datum=max(1, in_guide.bytes // rows),
            full_size=rows if own is None else own.full_size or rows,
            shares=any(not traced.is_inside(site, self.plate) for site in sites),
            summed=summed,
            reads_values=frozenset(kind for kind, seen in observers.items() if seen.reads_values),
            precision=max(torch.finfo(traced.site_log_prob(site).dtype).eps for site in sites),
            likelihoods=_likelihood_kinds(model_trace),
            why_unweighable=contract.why_unweighable(model_trace, guide_trace, self.plate)
            or self._why_masks_matter((model_trace, guide_trace)),
        )

    def _why_masks_matter(self, traces: TracePair) -> str | None:
        """Draw what is masked of the latents anew: a density that changes has no value of its own."""
        counted = {s["name"]: traced.counted_values(s) for s in traced.latent_sites(traces[1])}
        if all(each is None for each in counted.values()):
            return None
        drawn, other = _values_of(traces[1]), _values_of(self.alone(self.guide).trace())
        for name, mask in counted.items():
            if mask is not None:
                drawn[name] = torch.where(mask, drawn[name], other[name])
        changed = [*map(traced.changed_site, traces, _trace_given(self, drawn))]
        return contract.why_masks_matter(changed[0] or changed[1])

    def _check_rows(self, kind: str, trace: Trace, num_data: int) -> None:
        for site in traced.sample_sites(trace):
            if traced.is_inside(site, self.plate):
                contract.check_rows(kind, site, self.plate, num_data)

    def _look_at(self, function: PairFunction) -> tuple[Trace, RunObserver]:
        """Trace a function with validation on, or where Pyro's is off and that fails, without."""
        handler = poutine.trace(function)
        try:
            with validation_enabled(True), RunObserver() as observer:
                return handler.get_trace(*self.arguments, **self.keywords), observer
        except traced.CALLING_ERRORS:
            if Distribution._validate_args:
                raise
            with RunObserver() as observer:
                return handler.get_trace(*self.arguments, **self.keywords), observer

    def modules(self) -> list[nn.Module]:
        """Return every module that the functions can reach, submodules too."""
        return with_submodules(functions.modules_of(self.model, self.guide))

    def put_back(self) -> AbstractContextManager[None]:
        """Put generators and buffers back at the end, whatever happens inside."""
        return Snapshot(self.modules()).put_back()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Run the pair without leaving a trace: generators, buffers and modes are put back."""
        modes = functions.eval_mode(self.model, self.guide)
        with HANDLER_LOCK, torch.no_grad(), self.put_back(), modes:
            if isinstance(self.guide, AutoGuide) and self.guide.prototype_trace is None:
                # Its parameters are made for the data of its first call: these are all of them.
                self.guide(*self.arguments, **self.keywords)
            yield


def _values_of(trace: Trace) -> Latents:
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


def _nesting(traces: TracePair) -> int:
    sites = [site for trace in traces for site in traced.sample_sites(trace)]
    return max((-frame.dim for site in sites for frame in traced.vectorized_frames(site)), default=0)


def _likelihood_kinds(model_trace: Trace) -> frozenset[str]:
    observed = map(model_trace.nodes.get, traced.observed_names(model_trace))
    return frozenset(map(traced.likelihood_kind, observed))


@contextmanager
def any_number_of_data(kind: str, num_data: int) -> Iterator[None]:
    """Explain what a "model", "guide" or "pair" raises given another number of data points."""
    try:
        yield
    except InputError:
        raise
    except traced.CALLING_ERRORS as error:
        traced.raise_out_of_memory(error)
        wanted = f"a {kind} that takes any number of data points, as one without parameters for each"
        got = f"got an error for {num_data}: {first_line(error)}"
        raise InputError(f"expected {wanted} does, {got}") from error


def _gives_own_values(pair: OpenedPair, *, in_any_company: bool = True) -> bool:
    """Run a pair on some of its data and on these in another way: the densities must agree.

    The other way is the later half of them alone or, where the company may matter (statistics over
    the batch), all of them in reverse. The caller holds the lock, without gradients, in eval mode.
    """
    # A table with a row for each data point that is sliced by their number gives them the rows of
    # others. While it is constant (as parameters often start) the other way would not show that:
    # whatever has as many rows as there are data is moved for a second trial, and put back.
    count = min(pair.num_data, _TRIED)
    # At least two: one alone would broadcast against parameters of any number of data.
    later = torch.arange(min(count // 2, count - 2), count)
    rows = later if in_any_company else torch.arange(count).flip(0)
    with functions.forget_new_names() as new_names:
        try:
            if not _holds_for(pair, count, rows):
                return False
            if not in_any_company:
                pair.part(later).trace()
            # Made for a part of the data, and no module's: what are they made like for all of them?
            store, modules = pyro.get_param_store(), functions.modules_of(pair.model, pair.guide)
            known = {id(parameter) for module in modules for parameter in module.parameters()}
            made = {name: store._params[name] for name in new_names()}
            made = {n: v for n, v in made.items() if {count, len(later)} & set(v.shape)}
            made = {name: value for name, value in made.items() if id(value) not in known}
            if made:
                for name in made:
                    del store[name]
                pair.part().trace()
            suspects = list(_tables_of(pair))
            if not suspects:
                return True
            with _move_tables(suspects):
                return _holds_for(pair, count, rows)
        except traced.CALLING_ERRORS as error:
            traced.raise_out_of_memory(error)
            return False


def _holds_for(pair: OpenedPair, count: int, rows: Tensor) -> bool:
    """Compare the densities of some rows of the first data points with those of all of these."""
    whole, others = pair.part(slice(count)), pair.part(rows)
    rows = rows.to(pair.device)
    traces = _trace_given(whole, {})
    sites = traced.latent_sites(traces[1]) + summed_sites(*traces)
    inside = [site for site in sites if traced.is_inside(site, pair.plate)]
    axes = {site["name"]: traced.value_axis(site, pair.plate) for site in inside}
    # A point mass follows from the other sites.
    drawn = {site["name"]: site["value"] for site in sites if not traced.is_delta(site["fn"])}
    random = {name: value for name, value in drawn.items() if name in axes}
    shared = {name: value for name, value in drawn.items() if name not in axes}
    expected = _densities(whole, traces)
    shown = {name: value.index_select(axes[name], rows) for name, value in random.items()}
    found = _densities(others, _trace_given(others, shared | shown))

    def again(latents: Latents) -> tuple[Tensor, ...]:
        return _densities(whole, _trace_given(whole, latents))

    def plain(latents: Latents) -> tuple[Tensor, ...]:
        filled = {n: random[n].index_copy(axes[n], rows, value) for n, value in latents.items()}
        return tuple(term[rows] for term in again(shared | filled))

    if any(term.shape != other[rows].shape for term, other in zip(found, expected, strict=True)):
        return False
    # What is drawn outside the sites (noise on the data) says nothing about a data point's place.
    return traced.agree(found, plain, shown) or not traced.all_close(again(drawn), expected)


def _trace_given(pair: OpenedPair, latents: Latents) -> TracePair:
    """Run the guide with the latents that are given, and the model with all of them."""
    with Given(latents):
        guide_trace = pair.alone(pair.guide).trace()
    with Given(latents | {site["name"]: site["value"] for site in traced.latent_sites(guide_trace)}):
        return pair.alone(pair.model).trace(), guide_trace


def _densities(pair: OpenedPair, traces: TracePair) -> tuple[Tensor, ...]:
    """Return log q, log p(x|z) and log p(z) of traced latents per data point, each ``(N,)``."""
    model_trace, guide_trace = traces
    observed = [site for site in traced.sample_sites(model_trace) if site["is_observed"]]
    groups = traced.sample_sites(guide_trace), observed, traced.latent_sites(model_trace)
    return tuple(traced.total(group, pair.plate, pair.inputs) for group in groups)


def _tables_of(pair: OpenedPair) -> Iterator[Tensor]:
    """Yield what the pair can reach with a dimension of the data's number, its inputs left out."""
    given = {value.data_ptr() for value in pair.inputs}
    numbers = {pair.num_data, pair.knowledge.whole or pair.num_data}
    values = list(pyro.get_param_store()._params.values())
    for module in functions.modules_of(pair.model, pair.guide):
        values += [*module.parameters(), *module.buffers()]
    values += functions.tensors_of(pair.model, pair.guide)
    for value in {id(value): value for value in values}.values():
        if numbers & set(value.shape) and value.data_ptr() not in given:
            yield value


@contextmanager
def _move_tables(tables: list[Tensor]) -> Iterator[None]:
    """Move the entries of tables, each by another amount, and put them back."""
    kept = [table.detach().clone() for table in tables]
    try:
        for table in tables:
            if table.is_floating_point():
                share = torch.rand(table.shape, device=table.device).to(table.dtype)
                # Towards 0, so that what is in a range stays so; zeros are parameters' starts.
                table.data.copy_(torch.where(table == 0, 0.1 * share, table * (1 - 0.1 * share)))
            else:
                for dim, size in enumerate(table.shape):
                    table.data.copy_(table.index_select(dim, torch.randperm(size).to(table.device)))
        yield
    finally:
        for table, value in zip(tables, kept, strict=True):
            table.data.copy_(value)
