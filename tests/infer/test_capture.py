"""What capture makes of a recorded graph: the same numbers by fewer operations."""

import pytest
import torch

from pyro_vae.infer.capture import fold_constants, trace_graph


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
