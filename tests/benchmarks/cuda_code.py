"""The code that Inductor would run on CUDA for a captured step, generated without a GPU.

    python tests/cuda_stand_in.py tests/benchmarks/cuda_code.py

For each of the main pairs the step of ``fit`` is captured on the stand-in, and lowered by Inductor
with Triton's driver left out: kernels are written, none is built or run. A line for each pair says
what is in it; the script ends with status 1 if a node is on the CPU, or if Inductor would not make a
CUDA graph of the step.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering

import pyro_vae as pv

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from cuda_pairs import OBJECTIVES, build  # noqa: E402 (a script beside this one)

PAIRS = [
    ("StandardNormal", "MeanFieldNormal", "Bernoulli"),
    ("GaussianMixture", "FullRankNormal", "Gaussian learned"),
    ("FlowPrior", "InverseAutoregressiveFlow", "Bernoulli"),
    ("VampPrior MeanFieldNormal", "MeanFieldNormal", "Bernoulli"),
    ("VonMisesFisher", "VonMisesFisher", "Bernoulli"),
    ("StandardNormal", "NeuralSplineFlow", "Bernoulli"),
]


@contextlib.contextmanager
def without_driver() -> Iterator[None]:
    """Let Inductor write Triton kernels that nobody builds."""
    with contextlib.ExitStack() as patches:
        for target, value in {
            "torch.utils._triton.has_triton": lambda *_: True,
            "torch._inductor.scheduler.has_triton": lambda *_: True,
            "torch.utils._triton.triton_hash_with_backend": lambda: "none",
            "torch._inductor.codegen.triton.triton_hash_with_backend": lambda: "none",
            "torch._C._cuda_cudaCachingAllocator_is_enabled": lambda: True,  # off on the stand-in
        }.items():
            with contextlib.suppress(AttributeError):  # not every version names it there
                patches.enter_context(mock.patch(target, value))
        patches.enter_context(mock.patch.object(AsyncCompile, "triton", return_value=None))
        patches.enter_context(config.patch(compile_threads=1, force_disable_caches=True))
        yield


def lower(graph: torch.fx.GraphModule, values: Sequence[torch.Tensor], options: dict) -> str:
    """Generate a graph's code; return what is in it, or raise what Inductor would fall back for."""
    seen: list[GraphLowering] = []
    codegen = GraphLowering.codegen

    def noted(self: GraphLowering) -> Any:
        found = codegen(self)
        seen.append(self)
        return found

    watched = mock.patch.object(GraphLowering, "codegen", noted)
    with without_driver(), watched, config.patch(options), torch.no_grad():
        compile_fx(graph, list(values))
    (lowered,) = seen
    reason = lowered.disable_cudagraphs_reason
    if "cpu" in lowered.device_types or reason:
        raise AssertionError(f"devices {sorted(lowered.device_types)}, CUDA graph: {reason or 'yes'}")
    return f"{len(lowered.scheduler.nodes)} nodes, all on {', '.join(lowered.device_types)}"


def main() -> int:
    failed = 0
    cases = [(", ".join(names), names, None) for names in PAIRS]
    cases += [(name, PAIRS[0], objective) for name, objective in OBJECTIVES.items() if objective]
    x = (torch.rand(32, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    for title, names, objective in cases:
        said: list[str] = []

        def compile(graph: Any, *, options: Any, said: list[str] = said, **_: Any) -> Callable:
            def run(*values: torch.Tensor) -> Any:
                if not said:
                    said.append(lower(graph, values, options))
                return graph(*values)

            return run

        pyro.clear_param_store()
        vae = build(*names)
        with mock.patch.object(torch, "compile", compile):
            result = pv.fit(
                vae.model, vae.guide, x, objective=objective, epochs=1, batch_size=16, device="cuda"
            )
        failed += not said
        print(f"{title}: {said[0] if said else result.compile_choice}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
