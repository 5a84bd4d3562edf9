"""A VAE, a beta-VAE and a VampPrior beside pythae or NumPyro at equal compute: test NLL, seconds.

    pip install pythae==0.1.2
    python tests/benchmarks/equal_compute.py --data-root FOLDER [--models vae beta vamp] [--seeds 3]
    pip install numpyro
    taskset -c 0 python tests/benchmarks/equal_compute.py --data-root FOLDER --rival numpyro \\
        --models vae beta

One thread, 50,000 MNIST images binarised once, networks 784-400-40 and back, batches of 100, Adam
at 1e-3: 3 epochs of a VAE, 1 of a beta-VAE at beta 2, 1 of a VAE under a VampPrior of 50 components.
Each library trains by its own loop at its defaults otherwise. NumPyro has no loop: whole epochs run
inside one compiled function, networks are jax's stax, the seconds hold the compilation. Here the
decoder starts at the data only for the models in --start. NLL: mean over 500 test images of the
importance-sampling estimate from 200 draws, in nats. Both take turns for each seed, so that a slow
spell falls on both.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import pyro_vae as pv

HIDDEN, LATENT_DIM, SHAPE = 400, 40, (1, 28, 28)
EPOCHS = {"vae": 3, "beta": 1, "vamp": 1}


def train_pythae(model: str, train: torch.Tensor, test: torch.Tensor, seed: int):
    from pythae.models import VAE, VAMP, BetaVAE, BetaVAEConfig, VAEConfig, VAMPConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU())
            self.mean, self.log_variance = (nn.Linear(HIDDEN, LATENT_DIM) for _ in range(2))

        def forward(self, x):
            body = self.body(x)
            return ModelOutput(embedding=self.mean(body), log_covariance=self.log_variance(body))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            layers = nn.Linear(LATENT_DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784), nn.Sigmoid()
            self.body = nn.Sequential(*layers)

        def forward(self, z):
            return ModelOutput(reconstruction=self.body(z).reshape(-1, *SHAPE))

    torch.manual_seed(seed)
    kind, config, more = {
        "vae": (VAE, VAEConfig, {}),
        "beta": (BetaVAE, BetaVAEConfig, {"beta": 2.0}),
        "vamp": (VAMP, VAMPConfig, {"number_components": 50}),
    }[model]
    how = {"input_dim": SHAPE, "latent_dim": LATENT_DIM, "reconstruction_loss": "bce", **more}
    network = kind(config(**how), encoder=Encoder(), decoder=Decoder())
    with tempfile.TemporaryDirectory() as folder:
        training = BaseTrainerConfig(
            output_dir=folder, num_epochs=EPOCHS[model], learning_rate=1e-3,
            per_device_train_batch_size=100, seed=seed, no_cuda=True,
        )  # fmt: skip
        begun = time.perf_counter()
        TrainingPipeline(model=network, training_config=training)(train_data=train)
        seconds = time.perf_counter() - begun
        network = kind.load_from_folder(_newest(folder)).eval()
    with torch.no_grad():
        return -network.get_nll(test, n_samples=200, batch_size=100), seconds


def _newest(folder: str) -> str:
    return str(next(Path(folder).glob("*/final_model")))


def train_numpyro(model: str, train: torch.Tensor, test: torch.Tensor, seed: int):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from jax.example_libraries import stax
    from numpyro import handlers

    beta = 2.0 if model == "beta" else 1.0

    def net(*sizes):
        hidden, last = (stax.Dense(size) for size in sizes)
        return stax.serial(hidden, stax.Relu, last)

    def generate(x):
        decode = numpyro.module("decoder", net(HIDDEN, 784), (len(x), LATENT_DIM))
        with numpyro.plate("data", len(x)):
            prior = ndist.Normal(jnp.zeros((len(x), LATENT_DIM)), 1.0).to_event(1)
            with handlers.scale(scale=beta):
                z = numpyro.sample("z", prior)
            numpyro.sample("x", ndist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def infer(x):
        encode = numpyro.module("encoder", net(HIDDEN, 2 * LATENT_DIM), (len(x), 784))
        with numpyro.plate("data", len(x)), handlers.scale(scale=beta):
            loc, log_scale = jnp.split(encode(x), 2, -1)
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    x, held_out = (jnp.asarray(part.flatten(1).numpy()) for part in (train, test))
    elbo = numpyro.infer.Trace_ELBO()
    svi = numpyro.infer.SVI(generate, infer, numpyro.optim.Adam(1e-3), elbo)

    @jax.jit
    def epoch(state, key):
        rows = jax.random.permutation(key, len(x))[: len(x) // 100 * 100].reshape(-1, 100)
        return jax.lax.fori_loop(0, len(rows), lambda i, s: svi.update(s, x[rows[i]])[0], state)

    first, *keys = jax.random.split(jax.random.PRNGKey(seed), EPOCHS[model] + 1)
    begun = time.perf_counter()
    state = svi.init(first, x[:100])
    for key in keys:
        state = epoch(state, key)
    parameters = jax.block_until_ready(svi.get_params(state))
    seconds = time.perf_counter() - begun

    def log_weight(key):
        guide = handlers.seed(handlers.substitute(infer, parameters), key)
        drawn = handlers.trace(guide).get_trace(held_out)
        scored = handlers.replay(handlers.substitute(generate, parameters), drawn)
        joint = handlers.trace(scored).get_trace(held_out)
        terms = [site["fn"].log_prob(site["value"]) for site in (joint["x"], joint["z"], drawn["z"])]
        return terms[0] + terms[1] - terms[2]

    weights = jax.lax.map(jax.jit(log_weight), jax.random.split(jax.random.PRNGKey(0), 200))
    estimate = jax.scipy.special.logsumexp(weights, 0) - math.log(200)
    return -float(estimate.mean()), seconds


def train_here(model: str, train: torch.Tensor, test: torch.Tensor, seed: int, *, start: bool):
    torch.manual_seed(seed)
    encoder, decoder = (
        pv.networks.MLPEncoder(SHAPE, (HIDDEN,)),
        pv.networks.MLPDecoder(LATENT_DIM, (HIDDEN,)),
    )
    guide = pv.guides.MeanFieldNormal(encoder, LATENT_DIM)
    prior = pv.priors.StandardNormal(LATENT_DIM)
    if model == "vamp":
        prior = pv.priors.VampPrior(guide, SHAPE, num_pseudo_inputs=50)
    vae = pv.VAE(prior, pv.likelihoods.Bernoulli(decoder, SHAPE), guide)
    if start:
        vae.start_at_data(train)
    begun = time.perf_counter()
    pv.fit(
        vae.model, vae.guide, train, epochs=EPOCHS[model], batch_size=100, learning_rate=1e-3,
        beta=2.0 if model == "beta" else 1.0, seed=seed, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    estimate = pv.log_marginal(vae.model, vae.guide, test, num_samples=200, keep_draws=0, seed=0)
    return -estimate.mean, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="folder of MNIST in torchvision's layout")
    parser.add_argument("--models", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--start", nargs="*", choices=list(EPOCHS), default=["vamp"])
    parser.add_argument("--rival", choices=["pythae", "numpyro"], default="pythae")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = pv.datasets.load("mnist", options.data_root, binarize="static", validation_size=10_000)
    train, test = data.train, data.test[:500]
    rival = options.rival
    train_rival = {"pythae": train_pythae, "numpyro": train_numpyro}[rival]
    if rival == "numpyro" and "vamp" in options.models:
        parser.error("expected --models vae or beta for numpyro, got vamp")
    print(f"| model | seed | NLL {rival} | NLL here | seconds {rival} | seconds here |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for model in options.models:
        found = []
        for seed in range(options.seeds):
            other = train_rival(model, train, test, seed)
            own = train_here(model, train, test, seed, start=model in options.start)
            found.append((other[0], own[0]))
            cells = (f"{value:.2f}" for value in (other[0], own[0], other[1], own[1]))
            print(f"| {model} | {seed} | " + " | ".join(cells) + " |", flush=True)
        if len(found) > 1:
            (mean, own), (spread, own_spread) = (
                [function(side) for side in zip(*found, strict=True)]
                for function in (statistics.mean, statistics.stdev)
            )
            print(
                f"{model}: here {own:.2f} (deviation between seeds {own_spread:.2f}), {rival} "
                f"{mean:.2f} ({spread:.2f}), difference {own - mean:+.2f} nats",
                flush=True,
            )


if __name__ == "__main__":
    main()
