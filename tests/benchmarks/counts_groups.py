"""Counts of five groups at known size factors: a VAE beside the true model and one without latents.

    python tests/benchmarks/counts_groups.py [--epochs 150] [--seeds 3]

Simulated: negative binomial counts of 60 features whose means differ between five groups of data
points, at size factors that spread over a factor of twenty. Told for each seed, in nats per held-out
data point: log p(x) under the true mixture, under negative binomials without latents (means and
dispersions fitted by maximum likelihood at the known size factors) and under the VAE (importance
sampling), and the share of the gap between the first two that the VAE closes. Then how well k-means
finds the groups (adjusted Rand index): in the VAE's codes, in as many principal components of log
counts, and of log counts after division by the size factor; and how well the true posterior does.
"""

from __future__ import annotations

import argparse
import math

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

import pyro_vae as pv
from pyro_vae.distributions.values import PreciseNegativeBinomial

NUM_GROUPS, NUM_FEATURES, LATENT_DIM = 5, 60, 4


def negative_binomial(log_mean, theta):
    return PreciseNegativeBinomial(theta, logits=log_mean - theta.log(), validate_args=False)


def simulate(num_data: int, seed: int):
    """Return counts, size factors, groups, and log p(x) of each group ``(N, groups)``."""
    torch.manual_seed(seed)
    base = torch.randn(NUM_FEATURES)
    log_means = base + 0.6 * torch.randn(NUM_GROUPS, NUM_FEATURES)
    theta = torch.full((NUM_FEATURES,), 2.0)
    groups = torch.randint(NUM_GROUPS, (num_data,))
    sizes = (0.75 * torch.randn(num_data)).exp()
    x = negative_binomial(log_means[groups] + sizes.log()[:, None], theta).sample()
    each = negative_binomial(log_means + sizes.log()[:, None, None], theta)
    return x, sizes, groups, each.log_prob(x[:, None]).sum(-1)


def fit_without_latents(x, sizes, steps: int = 1500):
    """Return log-means and theta of each feature that make the counts likeliest."""
    log_mean = (x.sum(0) / sizes.sum()).clamp(min=1e-3).log().requires_grad_()
    log_theta = torch.zeros(NUM_FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([log_mean, log_theta], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model = negative_binomial(log_mean + sizes.log()[:, None], log_theta.exp())
        (-model.log_prob(x).sum(1).mean()).backward()
        optimizer.step()
    return log_mean.detach(), log_theta.exp().detach()


def make_vae(num_components: int):
    encoder = pv.networks.MLPEncoder((NUM_FEATURES,), (128, 64), log1p=True)
    decoder = pv.networks.MLPDecoder(LATENT_DIM, (64, 128))
    prior = pv.priors.StandardNormal(LATENT_DIM)
    if num_components > 1:
        prior = pv.priors.GaussianMixture(LATENT_DIM, num_components)
    return pv.VAE(
        prior,
        pv.likelihoods.NegativeBinomial(decoder, (NUM_FEATURES,), size_factor="observed"),
        pv.guides.MeanFieldNormal(encoder, LATENT_DIM),
    )


def rand_index(codes, groups) -> float:
    found = KMeans(NUM_GROUPS, n_init=20, random_state=0).fit_predict(codes)
    return adjusted_rand_score(groups, found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    text = "of the prior, a Gaussian mixture; 1: a standard normal"
    parser.add_argument("--components", type=int, default=10, help=text)
    options = parser.parse_args()
    print("| seed | true | no latents | VAE | gap closed | ARI codes | PCA | PCA, sizes out | true |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for seed in range(options.seeds):
        x, sizes, groups, by_group = simulate(options.num_train + options.num_test, seed)
        train, test = slice(options.num_train), slice(options.num_train, None)
        true = (by_group[test].logsumexp(1) - math.log(NUM_GROUPS)).mean().item()
        log_mean, theta = fit_without_latents(x[train], sizes[train])
        alone = negative_binomial(log_mean + sizes[test].log()[:, None], theta)
        without = alone.log_prob(x[test]).sum(1).mean().item()
        torch.manual_seed(seed)
        vae = make_vae(options.components)
        data, held_out = (x[train], sizes[train]), (x[test], sizes[test])
        vae.start_at_data(data)
        pv.fit(
            vae.model, vae.guide, data, epochs=options.epochs, batch_size=128, warmup_epochs=10,
            schedule="cosine", learning_rate=2e-3, seed=seed, progress=False,
        )  # fmt: skip
        estimate = pv.log_marginal(
            vae.model, vae.guide, held_out, num_samples=options.num_samples, keep_draws=0, seed=seed
        )
        codes = pv.tasks.encode(vae.guide, held_out).numpy()
        log_counts = PCA(LATENT_DIM).fit_transform(x[test].log1p().numpy())
        scaled = PCA(LATENT_DIM).fit_transform((x[test] / sizes[test, None]).log1p().numpy())
        indices = [rand_index(values, groups[test]) for values in (codes, log_counts, scaled)]
        indices.append(adjusted_rand_score(groups[test], by_group[test].argmax(1)))
        share = (estimate.mean - without) / (true - without)
        numbers = [f"{value:.2f}" for value in (true, without, estimate.mean)]
        cells = [str(seed), *numbers, f"{share:.1%}", *(f"{index:.3f}" for index in indices)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
