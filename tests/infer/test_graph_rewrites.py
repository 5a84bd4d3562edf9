"""What capture makes of a recorded graph: the same numbers by fewer operations."""

import pytest
import torch

from pyro_vae.infer.capture import trace_graph
from pyro_vae.infer.graph_rewrites import fold_constants, for_replays


def _operations(graph):
    return [node for node in graph.graph.nodes if node.op == "call_function"]


CHAINS = {
    "there and back": (lambda x: (x.t().t() @ x.t()).expand(3, 3).sum(0), 3),
    "new dimensions": (lambda x: x[None].squeeze(0).view(3, 4).reshape(12).view(3, 4) + 1, 1),
    "one part of all": (lambda x: x.split(3)[0].mul(2).unbind(0)[1], 3),
    # Neither is the tensor it began as: another place in memory, another layout.
    "a later row": (lambda x: x[1:2].view(4) - x[0], 4),
    "transposed": (lambda x: x.t().contiguous().view(3, 4) + x, None),
}


@pytest.mark.parametrize("name", CHAINS)
def test_views_that_end_where_they_began_are_taken_out(name):
    function, count = CHAINS[name]
    x = torch.arange(12.0).view(3, 4)
    graph, closed_over, _ = trace_graph(lambda: (function(x),), [x])
    other = x + 5
    assert not closed_over
    assert torch.equal(graph(other)[0], function(other))
    if count is not None:
        assert len(_operations(graph)) == count


def test_what_is_written_in_place_is_seen_through_every_view():
    def function(x):
        fresh = x + 0
        alias = fresh.view(12).view(3, 4)
        fresh.mul_(2)
        alias.t().t().add_(1)
        return fresh, alias * 3

    x = torch.arange(12.0).view(3, 4)
    graph, *_ = trace_graph(lambda: function(x), [x])
    for found, expected in zip(graph(x - 7), function(x - 7), strict=True):
        assert torch.equal(found, expected)


def test_conjugates_are_no_views_of_the_same_numbers():
    def function(x):
        conjugate = torch.view_as_complex(x.view(3, 2, 2)).conj()
        return conjugate.resolve_conj().imag, conjugate.imag + 0

    x = torch.arange(12.0).view(3, 4)
    graph, *_ = trace_graph(lambda: function(x), [x])
    for found, expected in zip(graph(x + 1), function(x + 1), strict=True):
        assert torch.equal(found, expected)


def test_products_with_one_are_taken_out_but_not_what_is_written_or_returned():
    x = torch.arange(12.0).view(3, 4)

    def plain(x):
        return (x * 1.0 / 1).pow(1.0).sum(), x * 1

    def writing(x):
        fresh = x + 0
        kept = fresh * 1
        fresh.mul_(2)
        return fresh, kept

    for function, count in ((plain, 2), (writing, 3)):
        graph, *_ = trace_graph(lambda function=function: function(x), [x])
        assert len(_operations(graph)) == count
        for found, expected in zip(graph(x - 7), function(x - 7), strict=True):
            assert torch.equal(found, expected)
    assert graph(x)[1] is not x


def test_what_depends_on_no_input_is_computed_once():
    def function(x):
        prior = torch.ones_like(x).log() - torch.zeros_like(x[0]).exp()
        return (x * prior).sum(), prior.clone()

    x = torch.arange(12.0).view(3, 4)
    graph, *_ = trace_graph(lambda: function(x), [x])
    folded = fold_constants(graph)
    assert len(_operations(graph)) == 9
    assert len(_operations(folded)) == 3  # a product, a sum, and a copy for the caller
    for _ in range(2):
        for found, expected in zip(folded(x - 7), function(x - 7), strict=True):
            assert torch.equal(found, expected)
            found.zero_()


def test_a_constant_has_the_layout_of_what_it_is_like_and_may_be_a_keyword():
    def function(x):
        flat = torch.ones_like(x.t()).t().view(-1)
        ends = torch.zeros_like(x[0]).cumsum(0)
        found = torch.searchsorted(ends, x[0], sorter=torch.zeros_like(x[0], dtype=torch.long))
        return flat * x.view(-1), found + 0

    x = torch.arange(12.0).view(3, 4)
    graph, *_ = trace_graph(lambda: function(x), [x])
    folded = fold_constants(graph)
    for found, expected in zip(folded(x - 7), function(x - 7), strict=True):
        assert torch.equal(found, expected)


def test_draws_and_what_is_written_in_place_are_no_constants():
    def draw(x):
        return ((torch.ones_like(x) * 0.5).bernoulli(),)

    def count(x):
        seen = x.new_zeros(4)
        seen.add_(x[0])
        return (seen.clone(),)

    x = torch.ones(100, 4)
    graph, *_ = trace_graph(lambda: draw(x), [x])
    folded = fold_constants(graph)
    assert not torch.equal(folded(x)[0], folded(x)[0])
    graph, *_ = trace_graph(lambda: count(x), [x])
    folded = fold_constants(graph)
    for _ in range(2):
        assert torch.equal(folded(x)[0], torch.ones(4))


def test_a_vmapped_layer_is_one_product_that_holds_its_bias():
    layer = torch.nn.Linear(3, 5)

    def function(rows, weight, bias):
        return (torch.vmap(torch.nn.functional.linear, (0, None, None))(rows, weight, bias),)

    rows, weight, bias = torch.randn(7, 2, 3), layer.weight.detach(), layer.bias.detach()
    graph, *_ = trace_graph(lambda: function(rows, weight, bias), [rows, weight, bias])
    names = [str(node.target) for node in _operations(graph)]
    assert "aten.addmm.default" in names
    assert "aten.mm.default" not in names
    assert "aten.add.Tensor" not in names
    other = torch.randn(7, 2, 3)
    assert torch.allclose(graph(other, weight, bias)[0], layer(other), atol=1e-6)


def test_a_bias_that_is_written_to_between_is_added_as_it_was():
    def function(rows, weight, bias):
        scaled = torch.ops.aten.mul.Scalar(bias, 1)
        product = torch.ops.aten._unsafe_view(rows.view(14, 3) @ weight, (7, 2, 5))
        bias.add_(1)
        return (scaled + product,)

    values = torch.randn(7, 2, 3), torch.randn(3, 5)
    bias = torch.zeros(5)
    graph, *_ = trace_graph(lambda: function(*values, bias), [*values, bias])
    expected = function(*values, torch.ones(5))[0]
    assert torch.equal(graph(*values, torch.ones(5))[0], expected)


@pytest.mark.parametrize("kind", ["dtype", "of one", "of rows", "twice"])
def test_a_bias_that_no_layer_has_is_added_apart(kind):
    bias = {
        "dtype": torch.ones(5, dtype=torch.float64),
        "of one": torch.ones(1),
        "of rows": torch.ones(2, 5),
        "twice": torch.ones(5),
    }[kind]

    def function(rows, weight, bias):
        scaled = torch.ops.aten.mul.Scalar(bias, 2 if kind == "twice" else 1)
        return (scaled + torch.ops.aten._unsafe_view(rows.view(14, 3) @ weight, (7, 2, 5)),)

    given = torch.arange(42.0).view(7, 2, 3), torch.arange(15.0).view(3, 5), bias
    graph, *_ = trace_graph(lambda: function(*given), given)
    found, expected = for_replays(graph)(*given)[0], function(*given)[0]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


# Functions of x, (3, 4), and how many of their operations may write over an operand.
SPENT = {
    "a chain": (lambda x: (x + 1).relu().mul(2).exp().sum(0), 3),
    "through views of a product": (lambda x: (x @ x.t()).view(9).relu().view(3, 3) + 1, 2),
    "read again": (lambda x: (y := x + 1).relu() * y, 1),
    "read again by a view": (lambda x: (y := x + 1).relu() * y.t().t().sum(), 1),
    "an input": (lambda x: x.relu() + x, 1),
    "a view of an input": (lambda x: x.view(12).relu().view(3, 4) * 2, 1),
    "broadcast": (lambda x: x.sum(0) * x, 0),
    "another dtype": (lambda x: (x + 1).double().exp() > 2, 1),
    "returned": (lambda x: ((y := x + 1), y.relu()), 0),
    "with itself": (lambda x: (y := x + 1) * y, 1),
    "transposed": (lambda x: (x + 1).t().exp() * 2, 1),
    "a constant": (lambda x: torch.ones_like(x).exp() * x, 0),
    "drawn": (lambda x: (torch.ones_like(x) * 0.5).bernoulli() * 2, None),
}


@pytest.mark.parametrize("name", SPENT)
def test_operations_write_over_what_nobody_reads_again(name):
    function, count = SPENT[name]

    def run(x):
        torch.manual_seed(0)
        found = function(x)
        return found if isinstance(found, tuple) else (found,)

    x = torch.arange(12.0).view(3, 4) / 4 - 1
    graph, *_ = trace_graph(lambda: run(x), [x])
    ready = for_replays(graph)
    in_place = [node for node in _operations(ready) if node.target._schema.is_mutable]
    assert count is None or len(in_place) == count
    for shift in (0.0, -0.5, 0.0):  # a replay leaves nothing to the next
        given, kept = x + shift, x + shift
        torch.manual_seed(0)
        found = ready(given)
        assert torch.equal(given, kept)
        for own, expected in zip(found, run(kept), strict=True):
            assert torch.equal(own, expected)


def test_what_a_pair_writes_in_place_starts_anew_at_each_replay():
    def function(x):
        total = torch.zeros_like(x)
        total.add_(x)
        spent = (x * 1.0).mul_(2)  # a product with 1 that is written to stays
        return total.view(12).mul_(3).view(3, 4), spent.exp_()

    x = torch.arange(12.0).view(3, 4)
    graph, *_ = trace_graph(lambda: function(x), [x])
    ready = for_replays(graph)
    for shift in (0.0, -5.0, 0.0):
        given = x + shift
        for found, expected in zip(ready(given), function(x + shift), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(given, x + shift)


def test_what_is_written_need_not_be_the_first_argument():
    def function(x):
        total = torch.zeros_like(x)
        torch.exp(x + 1, out=total)
        once = total * 1.0
        torch.exp(x - 1, out=total)
        return once + 0, total.relu()

    x = torch.arange(12.0).view(3, 4)
    graph, *_ = trace_graph(lambda: function(x), [x])
    ready = for_replays(graph)
    for shift in (0.0, -5.0, 0.0):
        for found, expected in zip(ready(x + shift), function(x + shift), strict=True):
            assert torch.equal(found, expected)
