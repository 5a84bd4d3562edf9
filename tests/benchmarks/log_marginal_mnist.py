"""log p(x) of binarised MNIST's test set: importance sampling, and annealing beside it on a subset.

Run ``python tests/benchmarks/log_marginal_mnist.py --data-root FOLDER``. The network of Burda et al.
(784-200-200-50, tanh, images binarised afresh in every epoch) is trained by the ELBO and then by
IWAE, each with a cosine schedule; the defaults take ten minutes on two cores. Its 10,000 test images
are then weighed by importance sampling, and the first 200 by annealing and by `auto` as well. Prints
Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable

import torch

import pyro_vae as pv
from pyro_vae.evaluation import LogMarginal


def train(data: pv.datasets.Dataset, options: argparse.Namespace) -> pv.VAE:
    torch.manual_seed(0)
    shape, widths = data.data_shape, (200, 200)
    vae = pv.VAE(
        pv.priors.StandardNormal(50),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(50, widths, activation="tanh"), shape),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(shape, widths, activation="tanh"), 50),
    )
    vae.likelihood.start_at_mean(data.train.mean(0))
    phases = [
        (pv.infer.TraceBound(), options.epochs, options.learning_rate, options.warmup_epochs),
        (pv.infer.IWAE(options.particles), options.iwae_epochs, options.iwae_learning_rate, 0),
    ]
    begin = time.perf_counter()
    for objective, epochs, learning_rate, warmup_epochs in phases:
        if epochs:
            result = pv.fit(
                vae.model,
                vae.guide,
                data,
                objective=objective,
                epochs=epochs,
                batch_size=options.batch_size,
                learning_rate=learning_rate,
                warmup_epochs=warmup_epochs,
                schedule="cosine",
                device=options.device,
                seed=0,
                on_epoch=told_every(max(1, epochs // 10)),
            )
            print(f"{type(objective).__name__}: {result.seconds:.0f} s, {result.compile_choice}")
    print(f"trained in {(time.perf_counter() - begin) / 60:.1f} minutes, all counted", flush=True)
    return vae


def told_every(period: int) -> Callable[[int, dict[str, float]], None]:
    def tell(epoch: int, row: dict[str, float]) -> None:
        if epoch % period == 0:
            bound, elbo = row["train_bound"], row["validation_elbo"]
            print(f"  {epoch}: train {bound:.2f}, validation ELBO {elbo:.2f}", flush=True)

    return tell


def estimated(name: str, vae: pv.VAE, x: torch.Tensor, **options: object) -> LogMarginal:
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table has a column for it
        estimate = pv.log_marginal(vae.model, vae.guide, x, seed=0, **options)  # type: ignore[arg-type]
    seconds = time.perf_counter() - begin
    annealed, cost = estimate.methods.count("annealed"), estimate.cost.double().mean()
    k = "" if estimate.method == "annealed" else f"{estimate.num_unreliable / len(x):.1%}"
    print(
        f"| {name} | {len(x)} | {estimate.mean:.3f} | {estimate.mean_standard_error:.3f} | "
        f"{estimate.data_standard_error:.2f} | {k} | {1 - estimate.num_unreliable / len(x):.1%} | "
        f"{annealed} | {cost:.0f} | {seconds:.0f} |",
        flush=True,
    )
    return estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, help="where the MNIST files are, or go")
    parser.add_argument("--model", help="folder of a saved model to weigh instead of training one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warmup-epochs", type=int, default=10)
    parser.add_argument("--iwae-epochs", type=int, default=45)
    parser.add_argument("--iwae-learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--particles", type=int, default=5, help="of the IWAE phase")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--save", help="folder to keep the trained model in")
    parser.add_argument("--num-test", type=int, default=10_000)
    parser.add_argument("--num-samples", type=int, default=5_000)
    parser.add_argument("--num-annealed", type=int, default=200)
    parser.add_argument("--num-chains", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=1_000)
    parser.add_argument("--num-bracket", type=int, default=0, help="data of a bidirectional check")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = pv.datasets.load("mnist", root=options.data_root)
    vae = pv.load(options.model, device=options.device) if options.model else train(data, options)
    if options.save:
        pv.save(vae, options.save)
    test_x = data.test[: options.num_test].to(options.device)
    print(
        "| method | data | mean log p(x) | MC error | data error | k > 0.7 | trusted | annealed | "
        "evaluations per datum | seconds |\n" + "| --- " * 10 + "|"
    )
    importance = f"importance, {options.num_samples} samples"
    annealed = f"annealed, {options.num_chains} chains, at most {options.num_steps} steps"
    estimated(importance, vae, test_x, num_samples=options.num_samples)
    subset = test_x[: options.num_annealed]
    sampled = estimated(importance, vae, subset, num_samples=options.num_samples)
    chains = {"num_chains": options.num_chains, "num_steps": options.num_steps}
    moved = estimated(annealed, vae, subset, method="annealed", **chains)
    estimated("auto", vae, subset, method="auto", max_annealed=len(subset), **chains)
    difference = moved.log_prob - sampled.log_prob
    error = (moved.standard_error.square() + sampled.standard_error.square()).sum().sqrt()
    print(f"annealed minus importance: {difference.mean():.3f} +- {error / len(subset):.3f} nats")
    if options.num_bracket:
        bracket = {"num_data": options.num_bracket, "seed": 0, **chains}
        print(pv.evaluation.bidirectional(vae.model, vae.guide, subset, **bracket))


if __name__ == "__main__":
    main()
