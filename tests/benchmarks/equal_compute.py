"""A VAE, a beta-VAE and a VampPrior beside pythae at equal compute: NLL on test images, seconds.

    pip install pythae==0.1.2
    python tests/benchmarks/equal_compute.py --data-root FOLDER [--models vae beta vamp] [--seeds 3]

One thread, 50,000 MNIST images binarised once, networks 784-400-40 and back, batches of 100, Adam
at 1e-3: 3 epochs of a VAE, 1 of a beta-VAE at beta 2, 1 of a VAE under a VampPrior of 50 components.
Each library trains by its own loop at its defaults otherwise; here the decoder starts at the data
only for the models in --start. NLL: mean over 500 test images of the importance-sampling estimate
from 200 draws, in nats. Both take turns for each seed, so that a slow spell falls on both.
"""

from __future__ import annotations

import argparse
import logging
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
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = pv.datasets.load("mnist", options.data_root, binarize="static", validation_size=10_000)
    train, test = data.train, data.test[:500]
    print("| model | seed | NLL pythae | NLL here | seconds pythae | seconds here |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for model in options.models:
        found = []
        for seed in range(options.seeds):
            other = train_pythae(model, train, test, seed)
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
                f"{model}: here {own:.2f} (deviation between seeds {own_spread:.2f}), pythae "
                f"{mean:.2f} ({spread:.2f}), difference {own - mean:+.2f} nats",
                flush=True,
            )


if __name__ == "__main__":
    main()
