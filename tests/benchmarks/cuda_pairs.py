"""Every pair of components on CUDA, or the stand-in for it: trained, weighed, annealed, saved.

    python tests/cuda_stand_in.py tests/benchmarks/cuda_pairs.py [--once] [--objectives]

Each pair of a prior and a family whose latents have the same support, under every likelihood, does
all that can be done with a pair; ``--once`` takes as few pairs as it needs for each component to
appear, trains and saves them, and does all only with the first. What is built beside the device
fails here as it would on a GPU: the script prints a line for each pair and ends with status 1 if any
failed. ``--objectives`` trains one pair by each of them too. The pilots of annealing are cut short:
more of the same steps would meet no other device.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import torch

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation import pilot

sys.path.insert(0, str(Path(__file__).parents[1]))
from components import (
    DATA_SHAPE,
    FAMILIES,
    LIKELIHOODS,
    PRIOR_SUPPORT,
    PRIORS,
    SUPPORT,
    make_family,
    make_likelihood,
    make_prior,
)

OBJECTIVES = {
    "ELBO": None,
    "IWAE": pv.infer.IWAE(3),
    "IWAE, plain gradient": pv.infer.IWAE(3, gradient="plain"),
    "sticking the landing": pv.infer.StickingTheLanding(),
    "analytic KL": pv.infer.AnalyticKL(),
    "free bits": pv.infer.FreeBits(0.5),
}


# The pairs take turns, as each way costs a second and more of the stand-in's time.
ANNEALING = itertools.cycle(
    {"start": start, "schedule": schedule}
    for start in ("both", "guide", "prior")
    for schedule in ("linear", "adaptive", "sigmoid")
)


def pairs(once: bool) -> Iterator[tuple[str, str, str]]:
    """Names of prior, family and likelihood that go together; a VampPrior's is its own family."""
    matching = [
        (prior, family)
        for prior, family in itertools.product(PRIORS, FAMILIES)
        if PRIOR_SUPPORT[prior] == SUPPORT[family]
        and (not prior.startswith("VampPrior") or prior == f"VampPrior {family}")
    ]
    if not once:
        for (prior, family), likelihood in itertools.product(matching, LIKELIHOODS):
            yield prior, family, likelihood
        return
    turn, seen = itertools.cycle(LIKELIHOODS), set()
    for prior, family in matching:
        if prior not in seen or family not in seen:
            seen |= {prior, family}
            yield prior, family, next(turn)


def build(prior: str, family: str, likelihood: str) -> pv.VAE:
    q = make_family(family)
    if prior.startswith("VampPrior"):
        p = pv.priors.VampPrior(q, DATA_SHAPE, num_pseudo_inputs=4, learn_weights=True)
    else:
        p = make_prior(prior)
    return pv.VAE(p, make_likelihood(likelihood), q)


def use(vae: pv.VAE, x: torch.Tensor, *, whole: bool) -> Iterator[str]:
    """Do all that can be done with a pair; yields what comes next."""
    options = {"epochs": 1, "batch_size": 16, "seed": 0, "device": "cuda"}
    yield "start at data"
    vae.start_at_data(x)
    yield "eager steps"
    pv.fit(vae.model, vae.guide, x, compile=False, validation=x, **options)
    yield "captured steps"
    result = pv.fit(vae.model, vae.guide, x, compile=True, **options)
    if not result.compiled:
        raise AssertionError(f"expected captured steps, got {result.compile_choice}")
    yield "weights"
    pv.log_weights(vae.model, vae.guide, x, num_samples=3)
    yield "save and load"
    with tempfile.TemporaryDirectory() as folder:
        again = pv.load(pv.save(vae, Path(folder) / "run"), device="cuda")
    first, second = (part.state_dict().values() for part in (vae, again))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise AssertionError("expected the saved tensors back")
    if not whole:
        return
    yield "importance sampling, compiled"
    pv.log_marginal(vae.model, vae.guide, x, num_samples=64, compile=True, seed=0)
    yield "annealing"
    few = {"num_chains": 2, "num_steps": 3, "num_leapfrog_steps": 1, "seed": 0, **next(ANNEALING)}
    try:
        pv.log_marginal(vae.model, vae.guide, x[:4], method="annealed", **few)
    except InputError as refused:  # the sphere has no flat space to move in
        if "bijection" not in str(refused):
            raise
    yield "completion"
    missing = torch.zeros(4, *DATA_SHAPE, dtype=torch.bool)
    missing[..., 0] = True
    pv.tasks.complete(vae.model, vae.guide, x[:4], missing, num_draws=2, num_steps=3, seed=0)
    yield "representation"
    pv.evaluation.representation(vae.model, vae.guide, x, seed=0)


def cut_pilots_short() -> None:
    """Leave few chains and stops of annealing's pilots."""
    for name, number in {"CHAINS": 4, "_STOPS": 3, "_REPEATS": 1, "_ROUNDS": 1}.items():
        getattr(pilot, name)  # it must be there
        setattr(pilot, name, number)


def attempt(name: str, work: Callable[[], Iterator[str]]) -> bool:
    """Run the steps of one pair; print what became of it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    step = "building"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in work():  # noqa: B007
                pass
    except Exception:
        print(f"FAILS  {name}: {step}\n{traceback.format_exc(limit=-6)}", flush=True)
        return False
    print(f"holds  {name}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="each component in one pair")
    parser.add_argument("--from-pair", type=int, default=0, help="number of the first pair, from 0")
    parser.add_argument("--every", type=int, default=1, help="only each such pair from there on")
    parser.add_argument("--whole-every", type=int, default=1, help="do all with each such pair only")
    parser.add_argument("--priors", nargs="+", choices=PRIORS, help="only pairs with one of these")
    parser.add_argument("--objectives", action="store_true", help="each objective on one pair too")
    options = parser.parse_args()
    cut_pilots_short()
    x = (torch.rand(32, *DATA_SHAPE, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    results = []
    for names in itertools.islice(pairs(options.once), options.from_pair, None, options.every):
        if options.priors and names[0] not in options.priors:
            continue
        whole = not results if options.once else len(results) % options.whole_every == 0

        def work(names=names, whole=whole) -> Iterator[str]:
            return use(build(*names), x, whole=whole)

        results.append(attempt(", ".join(names), work))
    if options.objectives:
        for (name, objective), compile in itertools.product(OBJECTIVES.items(), (False, True)):

            def train(objective=objective, compile=compile) -> Iterator[str]:
                vae = build("StandardNormal", "MeanFieldNormal", "Bernoulli")
                options = {"epochs": 1, "batch_size": 16, "seed": 0, "device": "cuda"}
                yield "training"
                pv.fit(vae.model, vae.guide, x, objective=objective, compile=compile, **options)

            results.append(attempt(f"{name}, {'captured' if compile else 'eager'}", train))
    print(f"{sum(results)} of {len(results)} hold")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
