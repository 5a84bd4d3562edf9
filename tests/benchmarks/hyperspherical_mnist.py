"""Normal against von Mises-Fisher latents on MNIST, in the setting of the hyperspherical VAE.

    python tests/benchmarks/hyperspherical_mnist.py --data-root DATA [--dim 10] [--epochs 60]

784-256-128-d ReLU networks, batch 64, Adam at 1e-3, dynamic binarisation, log p(x) of the whole test
set by importance sampling, 500 samples; a sphere of dimension d lies in d + 1 dimensions. Davidson
et al. 2018, "Hyperspherical Variational Auto-Encoders", table 1, d = 10: -93.84 for the normal and
-93.16 for the von Mises-Fisher, after up to 1,000 epochs with early stopping. Fewer are run here
by default; the epochs and seconds taken are printed beside the result.
"""

from __future__ import annotations

import argparse
import json
import platform

import torch

import pyro_vae as pv

HIDDEN = (256, 128)


def build(kind: str, dim: int, shape: tuple[int, ...]) -> pv.VAE:
    latent_dim = dim if kind == "normal" else dim + 1
    encoder = pv.networks.MLPEncoder(shape, HIDDEN)
    decoder = pv.networks.MLPDecoder(latent_dim, HIDDEN[::-1])
    likelihood = pv.likelihoods.Bernoulli(decoder, shape)
    if kind == "normal":
        prior = pv.priors.StandardNormal(latent_dim)
        return pv.VAE(prior, likelihood, pv.guides.MeanFieldNormal(encoder, latent_dim))
    prior = pv.priors.HypersphericalUniform(latent_dim)
    return pv.VAE(prior, likelihood, pv.guides.VonMisesFisher(encoder, latent_dim))


def trained(vae: pv.VAE, data: pv.datasets.Dataset, options: argparse.Namespace) -> dict[str, object]:
    """Train ``vae`` in place; what the training took, for the printed row."""
    result = pv.fit(
        vae.model,
        vae.guide,
        data,
        epochs=options.epochs,
        batch_size=64,
        learning_rate=1e-3,
        warmup_epochs=options.warmup_epochs,
        schedule=options.schedule,
        patience=options.patience,
        seed=options.seed,
    )
    return {
        "epochs": len(result.history["train_elbo"]),
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds),
    }


def weighed(vae: pv.VAE, x: torch.Tensor, num_samples: int, seed: int) -> dict[str, object]:
    """log p(x) in nats by ``num_samples`` importance samples, for the printed row."""
    x = x.to(next(vae.parameters()).device)
    estimate = pv.log_marginal(vae.model, vae.guide, x, num_samples=num_samples, seed=seed)
    return {
        "log_marginal": round(estimate.mean, 3),
        "standard_error": round(estimate.mean_standard_error, 4),
        "data_standard_error": round(estimate.data_standard_error, 3),
        "elbo": round(estimate.elbo.mean().item(), 3),
        "rate": round(estimate.rate.mean().item(), 3),
        "distortion": round(estimate.distortion.mean().item(), 3),
        "num_data": len(estimate.log_prob),
        "num_samples": num_samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=60, help="0: only estimate log p(x)")
    parser.add_argument("--warmup-epochs", type=int, default=10)
    parser.add_argument("--patience", type=int, default=50)
    parser.add_argument("--binarize", choices=["dynamic", "static"], default="dynamic")
    parser.add_argument("--kinds", nargs="+", default=["normal", "von-mises-fisher"])
    parser.add_argument("--num-data", type=int, default=10_000, help="test data for log p(x)")
    parser.add_argument("--num-samples", type=int, nargs="+", default=[500], help="for log p(x)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant")
    parser.add_argument("--start", help="--output of another run, whose models are trained on")
    parser.add_argument("--output", help="folder to keep the trained models in")
    options = parser.parse_args()
    data = pv.datasets.load(
        "mnist",
        options.data_root,
        validation_size=10_000,
        seed=options.seed,
        binarize=options.binarize,
    )
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(machine, flush=True)
    for kind in options.kinds:
        torch.manual_seed(options.seed)
        name = f"{kind}-{options.dim}-{options.seed}"
        vae = build(kind, options.dim, data.data_shape)
        if options.start:
            vae = pv.load(f"{options.start}/{name}")
        row: dict[str, object] = {"latents": kind, "dim": options.dim, "seed": options.seed}
        if options.epochs:
            row |= trained(vae, data, options)
        if options.output:
            pv.save(vae, f"{options.output}/{name}")
        for num_samples in options.num_samples:
            row |= weighed(vae, data.test[: options.num_data], num_samples, options.seed)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
