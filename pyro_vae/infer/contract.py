"""What a pair must keep to be trained: latents inside the data plate, parameters that Pyro knows."""

from __future__ import annotations

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.pair.sites import latent_sites
from pyro_vae.pair.state import accumulating_leaves


def check_latents(model_trace: Trace, guide_trace: Trace, plate: str) -> None:
    """Refuse latents outside the data plate, and latents of the model that the guide misses.

    Raises:
        InputError: the name of the first such latent.
    """
    for function, trace in (("model", model_trace), ("guide", guide_trace)):
        for site in latent_sites(trace):
            name = site["name"]
            if plate not in {frame.name for frame in site["cond_indep_stack"]}:
                raise InputError(
                    f"expected latent {name!r} of the {function} inside the data plate {plate!r}: "
                    "move it there, or name your plate by plate="
                )
            if name not in guide_trace.nodes:
                raise InputError(
                    f"expected a guide that draws every latent, {name!r} is missing: add "
                    "pyro.sample for it, or observe it in the model"
                )


def check_trainable(surrogate: Tensor, parameters: dict[str, Tensor]) -> None:
    """Refuse a pair without parameters, or with a trainable tensor that Pyro does not know.

    Args:
        surrogate: what is differentiated.
        parameters: unconstrained parameters by their name in Pyro's store.

    Raises:
        InputError: how many tensors are unknown, and their shapes.
    """
    if not surrogate.requires_grad:
        raise InputError(
            "expected parameters to train, the pair has none: name them by pyro.module or pyro.param"
        )
    known = {id(leaf) for leaf in parameters.values()}
    unknown = [leaf for leaf in accumulating_leaves(surrogate) if id(leaf) not in known]
    if unknown:
        shapes = sorted(tuple(leaf.shape) for leaf in unknown)
        raise InputError(
            f"expected every trainable tensor of the pair to be known to Pyro, {len(unknown)} are "
            f"not (shapes {', '.join(map(str, shapes[:3]))}): name their module by "
            "pyro.module under a name that is not taken, or freeze them by requires_grad_(False)"
        )
