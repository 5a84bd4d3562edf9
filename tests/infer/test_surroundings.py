"""What a pair's code reads besides its arguments is followed by the captured step, as stock does."""

import enum
import gc
import itertools
import random
import types
import weakref
from collections import deque
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_pairs import CountingELBO, run
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae.infer.surroundings import look_around

WEIGHT = 1.0  # a global that a pair names
WEIGHTS = (0.1, 0.35, 0.6, 0.85, 1.1, 1.35, 1.6, 1.85)


def weighted_pair(weight, shift=lambda: 0.0, network=lambda z: z):
    """A normal model with ``weight()`` on its latent site."""

    def model(x, *_):
        with poutine.scale(scale=weight()):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(z) + shift(), 1.0).to_event(1), obs=x)

    def guide(x, *_):
        loc = pyro.param("loc", torch.full((2,), 0.3))
        with poutine.scale(scale=weight()):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide


class Holder:
    weight = 1.0  # of the class, until an instance has its own
    offset = torch.zeros(2)


def annealed(place):
    """A pair, and what sets its weight, kept in one of the places where people keep it."""
    if place == "closure":
        weight = 1.0

        def read():
            return weight

        def put(value):
            nonlocal weight
            weight = value

        return weighted_pair(read), put
    if place == "global":
        return weighted_pair(lambda: WEIGHT), partial(globals().__setitem__, "WEIGHT")
    if place == "dict":
        options = {"weight": 1.0}
        return weighted_pair(lambda: options["weight"]), partial(options.__setitem__, "weight")
    if place == "list":
        values = [0.0, 1.0]
        return weighted_pair(lambda: values[1]), partial(values.__setitem__, 1)
    if place == "class":
        kind = type("Own", (), {"weight": 1.0})
        return weighted_pair(lambda: kind.weight), partial(setattr, kind, "weight")
    if place == "handler":
        handler = poutine.scale(scale=1.0)
        model, guide = weighted_pair(lambda: 1.0)
        return (handler(model), guide), partial(setattr, handler, "scale")
    holder = types.SimpleNamespace(weight=1.0) if place == "namespace" else Holder()
    return weighted_pair(lambda: holder.weight), partial(setattr, holder, "weight")


def losses_of(make, elbo, values):
    """Losses of steps before each of which a value is put in its place."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    (model, guide), put = make()
    optim, x = pyro.optim.SGD({"lr": 1e-3}), torch.linspace(-1, 1, 6).view(3, 2)
    svi = pyro.infer.SVI(model, guide, optim, elbo)
    losses = []
    for value in values:
        put(value)
        losses.append(svi.step(x))
    if isinstance(elbo, CountingELBO):
        elbo.graphs = elbo.num_graphs  # which are forgotten with the pair
    return losses


def assert_as_stock(make, values, *, graphs, replays):
    elbo = CountingELBO(backend="eager")
    found = losses_of(make, elbo, values)
    assert found == pytest.approx(losses_of(make, Trace_ELBO(), values), rel=2e-6)
    assert (elbo.graphs, elbo.replays) == (graphs, replays)


def slowly(*values):
    """More of a kind that some fast case stands for."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


PLACES = ["closure", "instance"]
PLACES += slowly("dict", "global", "list", "class", "handler", "namespace")


@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_changes_becomes_an_input(place):
    assert_as_stock(lambda: annealed(place), WEIGHTS, graphs=2, replays=len(WEIGHTS) - 2)


def test_a_number_among_the_arguments_becomes_an_input():
    def make():
        def model(x, weight):
            with poutine.scale(scale=weight["kl"][0]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x, weight):
            with poutine.scale(scale=weight["kl"][0]):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))

        return model, guide

    batches = [(torch.tensor(0.5), {"kl": [weight]}) for weight in WEIGHTS]
    elbo = CountingELBO(backend="eager")
    found, _, pair = run(make, elbo, batches)
    expected, *_ = run(make, Trace_ELBO(), batches)
    assert found == pytest.approx(expected, rel=1e-6)
    assert (elbo.num_graphs, elbo.replays) == (2, len(WEIGHTS) - 2)
    del pair  # with which the graphs are forgotten


def test_a_double_network_gets_double_numbers():
    def make():
        holder = Holder()

        def model(x):
            with poutine.scale(scale=holder.weight):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.sum())

        def guide(x):
            loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
            with poutine.scale(scale=holder.weight):
                pyro.sample("z", dist.Normal(loc, 1.0))

        def widened(x):
            model(x.double())

        return (widened, guide), partial(setattr, holder, "weight")

    elbo = CountingELBO(backend="eager")
    found = losses_of(make, elbo, WEIGHTS)
    assert found == pytest.approx(losses_of(make, Trace_ELBO(), WEIGHTS), rel=1e-12)
    assert elbo.graphs == 2


@pytest.mark.parametrize(
    ("change", "values", "graphs"),
    [
        ("flag", [True, False, True, False, True], 2),
        pytest.param("word", ["a", "b", "b", "a", "c"], 3, marks=pytest.mark.slow),
        ("function", [torch.tanh, torch.sigmoid, torch.tanh, torch.sigmoid], 2),
    ],
)
def test_what_is_no_number_is_captured_anew(change, values, graphs):
    def make():
        own = types.SimpleNamespace(value=values[0])

        def shift():
            if change == "flag":
                return 1.0 if own.value else -1.0
            if change == "word":
                return {"a": 0.0, "b": 1.0, "c": 2.0}[own.value]
            return own.value(torch.ones(2))

        return weighted_pair(lambda: 1.0, shift), partial(setattr, own, "value")

    assert_as_stock(make, values, graphs=graphs, replays=len(values) - graphs)


@pytest.mark.slow
def test_a_number_that_python_reads_runs_eagerly_after_four_values():
    """The probability of a dropout can't be a tensor."""

    def make():
        drop = nn.Dropout(0.1)
        return weighted_pair(lambda: 1.0, network=drop), partial(setattr, drop, "p")

    elbo = CountingELBO(backend="eager")
    values = [0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.6]
    with pytest.warns(UserWarning, match=r"eagerly: Dropout\.p changes time and again") as caught:
        found = losses_of(make, elbo, values)
    assert len(caught) == 1
    assert elbo.replays == 1
    assert found == pytest.approx(losses_of(make, Trace_ELBO(), values), rel=1e-6)


@pytest.mark.parametrize("place", ["attribute", *slowly("closure"), "condition"])
def test_a_tensor_that_is_replaced_is_followed(place):
    def make():
        if place == "condition":
            data = {"y": torch.zeros(2)}

            def unconditioned(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0).expand([2]).to_event(1))

            def guide(x):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))

            pair = poutine.condition(unconditioned, data=data), guide
            return pair, partial(data.__setitem__, "y")
        offset = torch.zeros(2)

        def put(value):
            nonlocal offset
            offset = value

        holder = Holder()
        if place == "attribute":
            return weighted_pair(lambda: 1.0, lambda: holder.offset), partial(
                setattr, holder, "offset"
            )
        return weighted_pair(lambda: 1.0, lambda: offset), put

    values = [torch.full((2,), value) for value in WEIGHTS]
    assert_as_stock(make, values, graphs=1, replays=len(values) - 1)


def test_a_constant_that_is_read_is_watched():
    def make():
        sizes = torch.tensor([2.0, 3.0])

        def put(value):
            sizes[1] = value

        return weighted_pair(lambda: sizes.prod().item()), put

    assert_as_stock(make, [1.0, 1.0, 1.0, 2.0, 2.0], graphs=2, replays=3)


def test_a_network_in_a_closure_is_replaced():
    def make():
        network = nn.Linear(2, 2)

        def put(seed):
            nonlocal network
            pyro.set_rng_seed(seed)
            network = nn.Linear(2, 2).requires_grad_(False)

        return weighted_pair(lambda: 1.0, network=lambda z: network(z)), put

    assert_as_stock(make, [1, 2, 3], graphs=3, replays=0)


def test_a_pair_that_counts_its_runs_is_stock():
    def make():
        holder = types.SimpleNamespace(runs=0)

        def weight():
            holder.runs += 1
            return 1.0 / holder.runs

        return weighted_pair(weight), lambda value: None

    elbo = CountingELBO(backend="eager")
    with pytest.warns(UserWarning, match=r"the pair changes SimpleNamespace\.runs itself") as caught:
        found = losses_of(make, elbo, [0] * 4)
    assert len(caught) == 1
    assert elbo.num_graphs == 0
    assert found == pytest.approx(losses_of(make, Trace_ELBO(), [0] * 4), rel=1e-6)


class Counter:
    """Counts its runs in one of the places where people count, and tells a weight by it."""

    def __init__(self, place):
        self.place, self.runs, self.share = place, torch.tensor(0.0), 0.0
        if place == "two numbers":
            self.runs = 0

    def weight(self):
        if self.place == "in place":
            self.runs += 1
        else:
            self.runs = self.runs + 1
        self.share = 1 / self.runs
        return self.share


@pytest.mark.parametrize("place", ["two numbers", *slowly("in place"), "replaced"])
def test_a_pair_that_counts_in_several_places_or_tensors_is_stock(place):
    def make():
        return weighted_pair(Counter(place).weight), lambda value: None

    elbo = CountingELBO(backend="eager")
    with pytest.warns(UserWarning, match=r"the pair changes Counter\.\w+ itself at each") as caught:
        found = losses_of(make, elbo, [0] * 6)
    assert len(caught) == 1
    assert elbo.num_graphs == 0
    assert found == pytest.approx(losses_of(make, Trace_ELBO(), [0] * 6), rel=1e-6)


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(5), lambda own: torch.rand((), generator=own)),
    "random": (lambda: random.Random(5), lambda own: own.random()),
    "numpy": (lambda: np.random.default_rng(5), lambda own: own.random()),
    "numpy of old": (lambda: np.random.RandomState(5), lambda own: own.rand()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_pair_that_draws_from_a_generator_of_its_own_is_stock(kind):
    start, draw = GENERATORS[kind]

    def make():
        own = start()
        return weighted_pair(lambda: 0.5 + draw(own)), lambda value: None

    elbo = CountingELBO(backend="eager")
    with pytest.warns(UserWarning, match="the pair changes 'own' itself at each run") as caught:
        found = losses_of(make, elbo, [0] * 6)
    assert len(caught) == 1
    assert elbo.num_graphs == 0
    assert found == pytest.approx(losses_of(make, Trace_ELBO(), [0] * 6), rel=1e-6)


@pytest.mark.parametrize("where", ["default", "tuple", "bound", "partial"])
def test_a_generator_that_no_name_holds_is_put_back_too(where):
    def make():
        own = np.random.default_rng(5)
        held, bound = (own, 1), own.random

        def by_default(own=own):
            return own.random()

        draw = {
            "default": by_default,
            "tuple": lambda: held[0].random(),
            "bound": lambda: bound(),
            "partial": partial(np.random.Generator.random, own),
        }[where]
        del own
        return weighted_pair(lambda: 0.5 + draw()), lambda value: None

    elbo = CountingELBO(backend="eager")
    with pytest.warns(UserWarning, match="the pair changes a generator itself at each run"):
        found = losses_of(make, elbo, [0] * 6)
    assert elbo.num_graphs == 0
    assert found == pytest.approx(losses_of(make, Trace_ELBO(), [0] * 6), rel=1e-6)


def test_a_generator_beside_the_pair_is_no_change():
    def make():
        own = np.random.default_rng(5)

        def weight():
            return 0.5 if own.bit_generator else 1.0

        return weighted_pair(weight), lambda value: own.random()

    assert_as_stock(make, [0] * 6, graphs=1, replays=5)


def test_a_function_with_its_arguments_bound_anew_at_each_step_is_one_graph():
    def make():
        def model(x, squash):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(squash(z), 1.0), obs=x)

        def guide(x, squash):
            pyro.sample("z", dist.Normal(squash(pyro.param("loc", torch.tensor(0.3))), 1.0))

        return model, guide

    def squashes(values):
        return [(torch.tensor(0.5), partial(torch.mul, other=value)) for value in values]

    # A number at each step, then another function.
    batches = squashes(WEIGHTS) + squashes(map(torch.tensor, WEIGHTS))
    batches += [(torch.tensor(0.5), partial(torch.add, other=1.0))]
    elbo = CountingELBO(backend="eager")
    found, _, pair = run(make, elbo, batches)
    expected, *_ = run(make, Trace_ELBO(), batches)
    assert found == pytest.approx(expected, rel=1e-6)
    assert (elbo.num_graphs, elbo.replays) == (4, len(batches) - 4)
    del pair


def test_results_that_a_run_leaves_with_the_pair_are_no_change():
    def make():
        with torch.inference_mode():
            seen = torch.ones(2)
        holder = types.SimpleNamespace(weight=1.0, seen=seen, last=torch.zeros(()).expand(3))

        def read():
            holder.last = (torch.ones(()) * holder.weight).expand(3)
            return holder.weight if len(holder.seen) == 2 else 0.0

        return weighted_pair(read), partial(setattr, holder, "weight")

    assert_as_stock(make, WEIGHTS, graphs=2, replays=len(WEIGHTS) - 2)


class Slots:
    __slots__ = ("weight",)


class Overridden(Holder):
    weight = 0.5


CONTAINERS = {
    "entry of an array": (lambda: np.ones(3), lambda own, value: own.__setitem__(1, value)),
    "array of one number": (lambda: np.ones(()), lambda own, value: own.__setitem__((), value)),
    "deque": (lambda: deque([1.0]), lambda own, value: own.__setitem__(0, value)),
    "set": (lambda: {1.0}, lambda own, value: (own.clear(), own.add(value))),
}


@pytest.mark.parametrize("kind", ["entry of an array", *slowly(*list(CONTAINERS)[1:])])
def test_what_a_container_holds_is_seen(kind):
    def make():
        construct, put = CONTAINERS[kind]
        own = construct()

        def weight():
            return float(max(own) if isinstance(own, set) else np.asarray(own).flat[-2:][0])

        return weighted_pair(weight), partial(put, own)

    values = [1.0, 0.5, 1.0, 0.25]
    assert_as_stock(make, values, graphs=3, replays=1)


class SlotsBelow(Slots):
    """Has a dictionary besides."""


class Mode(enum.IntEnum):
    NARROW = 1
    WIDE = 2


def test_a_member_of_an_enum_is_no_number():
    def make():
        holder = types.SimpleNamespace(mode=Mode.NARROW)

        def weight():
            return 2.0 if holder.mode is Mode.WIDE else 1.0

        return weighted_pair(weight), partial(setattr, holder, "mode")

    modes = [Mode.NARROW, Mode.NARROW, Mode.WIDE, Mode.WIDE, Mode.WIDE, Mode.NARROW, Mode.WIDE]
    assert_as_stock(make, modes, graphs=2, replays=5)


def test_an_objective_does_not_keep_a_pair_alive():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = self.forward
            self.last = torch.zeros(3)

        def forward(self, z):
            self.last = z.detach()
            return z.tanh()

    network = Keeping()
    model, guide = weighted_pair(lambda: 1.0, network=network)
    elbo, dead = CountingELBO(backend="eager"), []
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo)
    for _ in range(3):
        svi.step(torch.linspace(-1, 1, 6).view(3, 2))
    assert elbo.replays == 2
    weakref.finalize(network, dead.append, True)
    del svi, model, guide, network
    gc.collect()
    assert dead
    assert elbo.num_graphs == 0


@pytest.mark.parametrize("kind", [Slots, SlotsBelow, Overridden])
def test_slots_and_attributes_that_a_class_overrides_are_numbers_like_others(kind):
    def make():
        holder = kind()

        def put(value):
            if kind is not Overridden:
                holder.weight = value
            else:
                kind.weight = value

        put(1.0)
        return weighted_pair(lambda: holder.weight), put

    assert_as_stock(make, WEIGHTS, graphs=2, replays=len(WEIGHTS) - 2)


def test_a_forward_of_its_own_that_a_module_is_given_is_seen():
    def make():
        network = nn.Tanh()

        def put(forward):
            network.forward = forward

        return weighted_pair(lambda: 1.0, network=network), put

    values = [torch.tanh, torch.tanh, torch.tanh, torch.sigmoid, torch.sigmoid, torch.tanh]
    assert_as_stock(make, values, graphs=2, replays=4)


def test_a_call_that_depends_on_no_parameter_leaves_the_others_captured():
    """As the auxiliary loss of a semi-supervised pair, which learns of labelled data alone."""

    def make():
        def model(x, label=None):
            loc = pyro.param("loc", torch.zeros(3))
            with pyro.plate("data", len(x)):
                if label is not None:
                    pyro.sample("label", dist.Normal(x @ loc, 1.0), obs=label)

        return model, lambda x, label=None: None

    x, label = torch.arange(6.0).view(2, 3), torch.ones(2)
    batches = [(x,), (x, label), (x,), (x, label), (x,), (x, label), (x, label)]
    elbo = CountingELBO(backend="eager")
    with pytest.warns(UserWarning, match="its loss depends on no parameter") as caught:
        found, _, pair = run(make, elbo, batches)
    assert len(caught) == 1
    expected, *_ = run(make, Trace_ELBO(), batches)
    assert found == pytest.approx(expected, rel=1e-6)
    assert elbo.replays == 3
    del pair


@pytest.mark.parametrize("number", [np.float64, *slowly(np.float32)])
def test_numbers_of_numpy_become_inputs(number):
    values = [number(weight) for weight in WEIGHTS]
    assert_as_stock(lambda: annealed("instance"), values, graphs=2, replays=len(WEIGHTS) - 2)


def test_notes_of_the_pair_and_of_its_trainer_are_no_change():
    class Trained(Holder):
        def __init__(self):
            self.losses, self.shapes = [], []

        def note(self, value):
            self.losses.append(value)

        def read(self):
            self.shapes.append(len(self.shapes))
            return self.weight

    def make():
        trained = Trained()
        return weighted_pair(trained.read), trained.note

    assert_as_stock(make, list(WEIGHTS), graphs=1, replays=len(WEIGHTS) - 1)


@pytest.mark.parametrize(
    ("verify_every", "stale"), [(None, 1), pytest.param(3, 0, marks=pytest.mark.slow)]
)
def test_what_cant_be_seen_is_found_by_a_check(tmp_path, verify_every, stale):
    """The graph's third step is the first on another file; the checks are at 1, 2, 4, 8, ..."""
    file = tmp_path / "weight"

    def make():
        return weighted_pair(lambda: float(file.read_text())), lambda value: file.write_text(
            str(value)
        )

    elbo = CountingELBO(backend="eager", verify_every=verify_every)
    values = [1.0] * 3 + [2.0] * 4
    with pytest.warns(UserWarning, match="its loss .* differs from the eager") as caught:
        found = losses_of(make, elbo, values)
    assert len(caught) == 1
    assert elbo.replays == 2 + stale
    assert elbo.num_graphs == 0
    expected = losses_of(make, Trace_ELBO(), values)
    assert found[:3] == pytest.approx(expected[:3], rel=1e-6)
    assert (found[3] == pytest.approx(expected[3], rel=1e-6)) == (not stale)
    assert found[4:] == pytest.approx(expected[4:], rel=1e-3)


def test_names_that_no_code_of_the_pair_reads_are_left_out():
    holder = Holder()
    holder.weight, holder.history, holder.best = 0.5, [1.0, 2.0], 3.0
    model, guide = weighted_pair(lambda: holder.weight)
    names = {place.name for place in look_around([model, guide]).values()}
    assert "Holder.weight" in names
    assert not names & {"Holder.history", "Holder.best"}


# --- validation ------------------------------------------------------------------------------


def bernoulli_pair():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=z.expand(3)).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))

    return model, guide


def outcomes(elbo, batches):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = pyro.infer.SVI(*bernoulli_pair(), pyro.optim.SGD({"lr": 1e-2}), elbo)
    found = []
    for batch in batches:
        try:
            found.append(svi.step(batch))
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_batch_outside_the_support_raises_as_in_stock():
    good = torch.eye(3)
    batches = [good, good, 2 * good, good, good.clone().fill_(torch.nan), good]
    elbo = CountingELBO(backend="eager")
    found, expected = outcomes(elbo, batches), outcomes(Trace_ELBO(), batches)
    assert [type(value) for value in expected] == [float, float, str, float, str, float]
    assert [value for value in found if isinstance(value, str)] == [
        value for value in expected if isinstance(value, str)
    ]
    assert found[1::2] == pytest.approx(expected[1::2], rel=1e-6)
    assert elbo.replays == 5
    with pyro.validation_enabled(False):
        found = outcomes(CountingELBO(backend="eager"), [good, good, 2 * good])
        assert found == pytest.approx(outcomes(Trace_ELBO(), [good, good, 2 * good]), rel=1e-6)


def test_values_inside_the_support_cost_no_run_of_the_pair():
    runs = []

    def model(x):
        runs.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    elbo, counted = CountingELBO(backend="eager"), []
    with pyro.validation_enabled(True):
        for _ in range(8):
            elbo.loss_and_grads(model, guide, torch.eye(3))
            counted.append(len(runs))
    # Replayed from the second on, and held against stock at the replays 1, 2 and 4.
    assert [after - before for before, after in itertools.pairwise(counted)] == [
        1, 1, 0, 1, 0, 0, 0,
    ]  # fmt: skip


# --- pairs of every kind ---------------------------------------------------------------------


def test_a_distribution_made_once():
    prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1)

    def make():
        def model(x):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return model, weighted_pair(lambda: 1.0)[1]

    elbo = CountingELBO(backend="eager")
    batches = [(torch.ones(2),)] * 4
    assert run(make, elbo, batches)[0] == pytest.approx(run(make, Trace_ELBO(), batches)[0], rel=1e-6)
    assert elbo.replays == 3


def make_without_latent():
    def model(x):
        p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    return model, lambda x: None


def make_without_observed():
    def model(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, weighted_pair(lambda: 1.0)[1]


@pytest.mark.parametrize("make", [make_without_latent, make_without_observed])
def test_a_pair_without_latent_or_observed_sites(make):
    elbo = CountingELBO(backend="eager")
    batches = [(torch.ones(4),)] * 4
    assert run(make, elbo, batches)[0] == pytest.approx(run(make, Trace_ELBO(), batches)[0], rel=1e-6)
    assert elbo.replays == 3


@pytest.mark.parametrize("nesting", [1, *slowly(float("inf"))])
def test_vectorized_particles_have_one_dimension(nesting):
    shapes = []

    def make():
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                shapes.append(tuple(z.shape))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x):
            loc = pyro.param("loc", torch.zeros(2))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        return model, guide

    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": nesting}
    batches = [(torch.ones(3, 2),)] * 3
    expected, *_ = run(make, Trace_ELBO(**options), batches)
    stock = set(shapes)
    elbo = CountingELBO(backend="eager", **options)
    shapes.clear()
    assert run(make, elbo, batches)[0] == pytest.approx(expected, rel=1e-6)
    assert set(shapes) == stock
    assert elbo.replays == 2
    assert elbo.bound().max_plate_nesting == elbo.max_plate_nesting
