"""What a run of a pair moves besides its parameters: random generators and buffers, put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn


def with_submodules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """All the modules below ``modules``, each once."""
    return list({m: None for root in modules for m in root.modules()})


class Snapshot:
    """Generators and module buffers as they stand, to be put back by :meth:`restore`."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.buffers = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.generators = pyro.util.get_rng_state()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cuda_generators = torch.cuda.get_rng_state_all() if cuda else []

    def restore(self) -> None:
        """Put generators and buffers back."""
        pyro.util.set_rng_state(self.generators)
        if self.cuda_generators:
            torch.cuda.set_rng_state_all(self.cuda_generators)
        with torch.no_grad():
            for holder, name, buffer, value in self.buffers:
                holder[name] = buffer
                buffer.copy_(value)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Restore at the end, whatever happens inside."""
        try:
            yield
        finally:
            self.restore()

    def buffer_values(self) -> list[Tensor]:
        """Copies of the buffers as they are now."""
        return [buffer.detach().clone() for _, _, buffer, _ in self.buffers]


def accumulating_leaves(*roots: Tensor) -> list[Tensor]:
    """The leaves that a backward pass from the roots would give a gradient, in a fixed order."""
    leaves: dict[int, Tensor] = {}
    pending: list[Any] = [root.grad_fn for root in roots]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves[id(node.variable)] = node.variable
        pending += [following for following, _ in node.next_functions]
    return list(leaves.values())
