"""Rewrites of a recorded graph: the same numbers by fewer operations and less memory."""

from __future__ import annotations

import copy
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

aten = torch.ops.aten
_LARGEST_CONSTANT = 1 << 16  # elements of a graph's constants: larger ones are made when used
_VIEWS = (aten._unsafe_view.default, aten.view.default)  # of memory that may be all their own


def rewrite(graph: torch.fx.Graph) -> None:
    """Undo what ``vmap`` makes of a layer; take out what changes no number."""
    _join_layers(graph)
    _take_out_identities(graph)


def for_replays(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return the graph to be replayed by operators: constants folded, spent memory used again."""
    module = fold_constants(module)
    _write_in_place(module.graph)
    module.recompile()
    return module


def _is_mutable(node: torch.fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _written(node: torch.fx.Node) -> list[Any]:
    """Return what an operation writes to: not always its first argument."""
    arguments = node.target._schema.arguments if _is_mutable(node) else ()  # type: ignore[union-attr]
    places = [(i, one.name) for i, one in enumerate(arguments) if one.is_write]
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in places]


def _is_spent(value: Any) -> bool:
    """Tell whether a value's memory is its own and has one use, after which nobody reads it."""
    if not isinstance(value, torch.fx.Node) or len(value.users) != 1:
        return False
    if _is_mutable(value):  # what it gives back is what it has written to
        written = _written(value)
        return len(written) == 1 and written[0] is value.args[0] and _is_spent(_owner(written[0]))
    schema = getattr(value.target, "_schema", None)
    may_alias = value.target is aten._unsafe_view.default or getattr(value.target, "is_view", False)
    return schema is not None and not may_alias


def _owner(value: Any) -> Any:
    """Return what a view is of, where nothing but the view reads it."""
    while _target(value) in _VIEWS and len(value.users) == 1:
        value = value.args[0]
    return value


def _writes(graph: torch.fx.Graph) -> bool:
    """Tell whether anything is written in place that is read elsewhere."""
    fresh = aten.empty.memory_format
    written = [value for node in graph.nodes for value in _written(node)]
    return any(_target(one) is not fresh and not _is_spent(one) for one in written)


def _take_out_identities(graph: torch.fx.Graph) -> None:
    """Take out views that end where one began, and products with 1: a third of a recorded step."""
    views: dict[Any, list[Any]] = {}  # what a view is of, the nearest first
    negating = (aten._conj.default, aten._neg_view.default)  # by a mere mark
    with_one = (aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar)
    writes = _writes(graph)
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        same: list[Any] = []
        is_view = getattr(node.target, "is_view", False) and node.target not in negating
        if is_view or (node.target is getitem and first in views):
            views[node] = same = [first, *views.get(first, ())]
        elif node.target in with_one and not writes and node.args[1] == 1:
            kept = any(user.op == "output" or _is_mutable(user) for user in node.users)
            same = [] if kept else [first]
        layout = _layout(node)
        same = [before for before in same if layout and _layout(before) == layout]
        if same:
            node.replace_all_uses_with(same[-1])


def _join_layers(graph: torch.fx.Graph) -> None:
    """Add biases within the product, as a layer does: ``vmap`` makes ``1 * bias + product`` of it."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for scaled, viewed in (node.args, node.args[::-1]):
            if _target(scaled) is not aten.mul.Scalar or _target(viewed) not in _VIEWS:
                continue
            (bias, factor), product = scaled.args, viewed.args[0]
            is_alone = len(viewed.users) == len(product.users) == 1
            if factor != 1 or node.kwargs or _target(product) is not aten.mm.default or not is_alone:
                continue
            own, products, result = (each.meta["val"] for each in (bias, product, node))
            is_alike = own.shape == products.shape[1:] == result.shape[-1:]
            is_alike &= own.dtype == products.dtype  # a sum promotes, a product does not
            if not is_alike or any(map(_is_mutable, bias.users)):
                continue
            with graph.inserting_before(node):
                joined = graph.call_function(aten.addmm.default, (bias, *product.args))
                shaped = graph.call_function(viewed.target, (joined, viewed.args[1]))
            joined.meta, shaped.meta = dict(product.meta), dict(node.meta)
            node.replace_all_uses_with(shaped)
            break
    graph.eliminate_dead_code()


def _target(node: Any) -> Any:
    return getattr(node, "target", None)


def _layout(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return value.dtype, value.shape, value.stride(), value.storage_offset()


def fold_constants(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return the graph with what depends on no input computed once."""
    fills = {aten.ones_like.default: 1, aten.new_ones.default: 1}
    fills |= {aten.zeros_like.default: 0, aten.new_zeros.default: 0}
    known: dict[Any, Tensor] = {}
    module = copy.deepcopy(module)
    for node in [] if _writes(module.graph) else list(module.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() > _LARGEST_CONSTANT:
            continue
        if any(map(_is_mutable, (node, *node.users))):  # a replay would go on from the last one's
            continue
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.target in fills:
            like: Any = {"dtype": value.dtype, "device": value.device}
            fresh = torch.empty_strided(value.shape, value.stride(), **like)
            known[node] = fresh.fill_(fills[node.target])
        elif node.all_input_nodes and known.keys() >= {*node.all_input_nodes} and not is_random:
            args, kwargs = map_arg((node.args, node.kwargs), known.get)
            known[node] = node.target(*args, **kwargs)
    for node, constant in known.items():
        if any(user not in known for user in node.users):
            module.register_buffer(node.name, constant)
            with module.graph.inserting_before(node):
                held = module.graph.get_attr(node.name)
                if any(user.op == "output" for user in node.users):  # the caller may write to it
                    held = module.graph.call_function(aten.clone.default, (held,))
            node.replace_all_uses_with(held)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _write_in_place(graph: torch.fx.Graph) -> None:
    """Let operations by elements write over an operand that nobody reads again."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
            continue
        name, overload = node.target._schema.name.split("::")[1], node.target._overloadname
        in_place = getattr(getattr(aten, f"{name}_", None), overload, None)
        operand, layout = node.args[0] if node.args else None, _layout(node)
        if in_place and layout and _layout(operand) == layout and _is_spent(_owner(operand)):
            node.target = in_place
