"""The objectives by name, as the command line and ``fit`` take them."""

from collections.abc import Callable
from typing import Any

from pyro_vae.errors import InputError, unknown_name
from pyro_vae.infer.analytic_kl import AnalyticKL, FreeBits
from pyro_vae.infer.bounds import Bound, TraceBound
from pyro_vae.infer.iwae import IWAE
from pyro_vae.infer.sticking_the_landing import StickingTheLanding

OBJECTIVES: dict[str, Callable[..., Bound]] = {
    "elbo": TraceBound, "analytic-kl": AnalyticKL, "sticking-the-landing": StickingTheLanding,
    "free-bits": FreeBits, "iwae": IWAE,
}  # fmt: skip


def default_particles(name: str) -> int:
    """Return the draws of a step: 5 for IWAE, the smaller number of Burda et al. 2016, else 1."""
    return 5 if name == "iwae" else 1


def objective_named(name: str, num_particles: int | None = None, **options: Any) -> Bound:
    """Return an objective by its name."""
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, tuple(OBJECTIVES))
    if name == "free-bits" and "floor" not in options:
        wanted = "how many nats cost nothing with the objective 'free-bits'"
        raise InputError(f"expected {wanted}, got none: pass pyro_vae.infer.FreeBits(floor)")
    return OBJECTIVES[name](num_particles=num_particles or default_particles(name), **options)
