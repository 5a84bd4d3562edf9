"""Digits with their lower half missing: a VAE's completion beside three imputers, as a table.

    python tests/benchmarks/completion_digits.py [--epochs 400] [--seed 0]

The data are bits drawn once with the grey values as probabilities. Every method sees the whole
training digits and the upper half (32 of 64 pixels) of the test digits. Columns, over the missing
pixels of the test digits: root-mean-square error of the predicted means, and the mean over digits of
log p(missing given observed) in nats, with its standard error over digits.

The VAE's log-likelihood is log p(x) - log p(x observed), each estimated by pv.log_marginal: the first
by importance sampling, the second by annealing from the prior over the observed part. An imputer
gives no distribution: it is given independent Bernoulli pixels with its prediction p as their
probability, clipped to [c, 1 - c] with the c that makes the validation digits likeliest.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 (IterativeImputer asks for it)
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

import pyro_vae as pv
from pyro_vae import tasks

CLIPS = (1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)


def bernoulli(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Log-likelihood of each datum, nats."""
    return (x * np.log(p) + (1 - x) * np.log1p(-p)).sum(1)


def by_imputer(imputer, train, parts, hidden) -> list[np.ndarray]:
    """Predictions of the hidden pixels of each part: fitted together with the training data."""
    predictions = []
    for part in parts:
        rows = part.copy()
        rows[:, hidden] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            filled = imputer.fit_transform(np.concatenate([train, rows]))
        predictions.append(filled[len(train) :][:, hidden])
    return predictions


def row(name: str, error: float, values: np.ndarray, seconds: float, note: str) -> str:
    spread = values.std(ddof=1) / math.sqrt(len(values))
    return f"| {name} | {error:.4f} | {values.mean():.2f} ± {spread:.2f} | {seconds:.0f} | {note} |"


def train_vae(data, epochs: int, seed: int):
    torch.manual_seed(seed)
    encoder = pv.networks.MLPEncoder(data.data_shape, (512, 256))
    decoder = pv.networks.MLPDecoder(8, (256, 512))
    likelihood = pv.likelihoods.Bernoulli(decoder, data.data_shape)
    likelihood.start_at_mean(data.train.mean(0))
    vae = pv.VAE(pv.priors.StandardNormal(8), likelihood, pv.guides.MeanFieldNormal(encoder, 8))
    options = {"epochs": epochs, "batch_size": 64, "warmup_epochs": epochs // 10}
    pv.fit(vae.model, vae.guide, data, patience=50, seed=seed, progress=False, **options)
    return vae


def held_out_log_likelihood(vae, x, missing, chains: int, seed: int):
    """Return log p(x) - log p(x observed), ``(N,)``, and its Monte Carlo error of the mean."""
    pair = tasks.observed_pair(vae.model, vae.guide)
    options = {"method": "annealed", "start": "prior", "num_chains": chains, "num_steps": 400}
    whole = pv.log_marginal(vae.model, vae.guide, x, num_samples=5000, seed=seed)
    observed = pv.log_marginal(*pair, (x, missing), seed=seed, **options)
    error = math.hypot(whole.mean_standard_error, observed.mean_standard_error)
    print(
        f"log p(x) {whole.mean:.2f}, log p(x observed) {observed.mean:.2f}, Monte Carlo error of "
        f"the difference {error:.3f} nats; importance weights with k > 0.7: "
        f"{whole.num_unreliable} of {len(x)}"
    )
    return (whole.log_prob - observed.log_prob).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chains", type=int, default=16, help="of annealing, for log p(x observed)")
    parser.add_argument("--data", type=int, default=None, help="only the first so many test digits")
    options = parser.parse_args()

    grey = pv.datasets.load("digits", binarize="dynamic", seed=options.seed)
    fixed = pv.datasets.load("digits", binarize="static", seed=options.seed)
    x = fixed.test[: options.data]
    missing = torch.zeros_like(x, dtype=torch.bool)
    missing[..., 4:, :] = True
    hidden = missing[0].flatten().numpy()
    lines = [
        "| method | RMSE | log p(missing given observed), nats | s | log-likelihood by |",
        "| --- | --- | --- | --- | --- |",
    ]

    train, validation, test = (
        part.flatten(1).double().numpy() for part in (fixed.train, fixed.validation, x)
    )
    truth, known = test[:, hidden], validation[:, hidden]
    imputers = {
        "mean of the training data": SimpleImputer(),
        "10 nearest neighbours (KNNImputer)": KNNImputer(n_neighbors=10),
        "IterativeImputer (Bayesian ridge)": IterativeImputer(random_state=options.seed),
    }
    for name, imputer in imputers.items():
        start = time.perf_counter()
        predicted, tuning = by_imputer(imputer, train, (test, validation), hidden)
        seconds = time.perf_counter() - start
        clip = max(CLIPS, key=lambda c: bernoulli(known, tuning.clip(c, 1 - c)).mean())
        values = bernoulli(truth, predicted.clip(clip, 1 - clip))
        error = math.sqrt(((truth - predicted) ** 2).mean())
        lines.append(row(name, error, values, seconds, f"plug-in Bernoulli, c = {clip}"))

    start = time.perf_counter()
    vae = train_vae(grey, options.epochs, options.seed)
    device = next(vae.parameters()).device
    x, missing = x.to(device), missing.to(device)
    print(f"VAE trained in {time.perf_counter() - start:.0f} s")
    values = held_out_log_likelihood(vae, x, missing, options.chains, options.seed)
    for method in ("metropolis", "importance", "pseudo-gibbs"):
        start = time.perf_counter()
        result = tasks.complete(
            vae.model,
            vae.guide,
            x,
            missing,
            method=method,
            num_draws=options.draws,
            num_steps=None if method == "importance" else options.steps,
            num_samples=5000 if method == "importance" else None,
            seed=options.seed,
        )
        seconds = time.perf_counter() - start
        error = (result.mean - x)[missing].square().mean().sqrt().item()
        note = "log p(x) - log p(x observed)"
        lines.append(row(f"VAE, {method}", error, values, seconds, note))
        diagnostics = {
            "acceptance": result.acceptance,
            "R-hat": result.r_hat,
            "effective sample size": result.ess,
        }
        said = (
            f"{key} median {value.double().median():.3f}, worst "
            f"{(value.min() if key != 'R-hat' else value.max()):.3f}"
            for key, value in diagnostics.items()
            if value is not None
        )
        print(f"{method} ({result.guarantee}): {'; '.join(said) or 'no diagnostics'}")
    print(f"{len(x)} test digits, seed {options.seed}, torch {torch.__version__}, {device}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
