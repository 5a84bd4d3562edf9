"""Colour patches of photographs: dense, convolutional and residual networks, in bits per dimension.

    python tests/benchmarks/rgb_patches.py [--networks mlp conv resnet] [--folder PICTURES]

Patches 3 x 32 x 32 of scikit-learn's two sample photographs: for training from the left half of
each, for testing from the right half. The likelihood is DiscretizedLogistic with 256 levels. A row
for each network tells, of the test patches: bits per dimension by importance sampling and by the
ELBO, the rate in nats, and the active units; the last row is a baseline of independent values, the
histogram of each channel over the training patches (one added to each count). With a folder, draws
and reconstructions are written there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images

import pyro_vae as pv

SIZE, LATENT_DIM = 32, 32
SHAPE = (3, SIZE, SIZE)


def patches(number: int, *, left: bool, seed: int) -> torch.Tensor:
    """Return patches of one half of each photograph, values k / 255."""
    random, found = np.random.default_rng(seed), []
    images = load_sample_images().images
    for image in images:
        middle = image.shape[1] // 2
        half = image[:, :middle] if left else image[:, middle:]
        for _ in range(number // len(images)):
            row = random.integers(half.shape[0] - SIZE + 1)
            column = random.integers(half.shape[1] - SIZE + 1)
            found.append(half[row : row + SIZE, column : column + SIZE])
    values = torch.tensor(np.stack(found)).movedim(-1, 1).float() / 255
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


def histogram_bits(train: torch.Tensor, test: torch.Tensor) -> float:
    """Return the bits for each value of a code made for each channel's histogram."""
    bits = []
    for channel in range(3):
        values = (train[:, channel] * 255).round().long().flatten()
        share = torch.bincount(values, minlength=256).double() + 1
        coded = share.log2()[(test[:, channel] * 255).round().long()] - share.sum().log2()
        bits.append(-coded.mean().item())
    return sum(bits) / 3


def make_networks(name: str, channels: tuple[int, ...], blocks: int):
    if name == "mlp":
        return pv.networks.MLPEncoder(SHAPE, (512, 256)), pv.networks.MLPDecoder(
            LATENT_DIM, (256, 512)
        )
    how = {
        "norm": "group",
        "activation": "silu",
        "residual_blocks": blocks if name == "resnet" else 0,
    }
    encoder = pv.networks.ConvEncoder(SHAPE, channels, **how)
    return encoder, pv.networks.ConvDecoder(LATENT_DIM, SHAPE, channels[::-1], **how)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["mlp", "conv", "resnet"])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--residual-blocks", type=int, default=1, help="after each convolution")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-test", type=int, default=400)
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--sigma", default="learned")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train = patches(options.num_train, left=True, seed=options.seed)
    test = patches(options.num_test, left=False, seed=options.seed + 1)
    print("| network | bits per dimension | by the ELBO | rate | active units | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.networks:
        torch.manual_seed(options.seed)
        encoder, decoder = make_networks(name, tuple(options.channels), options.residual_blocks)
        likelihood = pv.likelihoods.DiscretizedLogistic(decoder, SHAPE, sigma=options.sigma)
        guide = pv.guides.MeanFieldNormal(encoder, LATENT_DIM)
        vae = pv.VAE(pv.priors.StandardNormal(LATENT_DIM), likelihood, guide)
        vae.start_at_data(train)
        result = pv.fit(
            vae.model,
            vae.guide,
            train,
            epochs=options.epochs,
            batch_size=64,
            gradient_clip=200.0,
            schedule="cosine",
            learning_rate=options.learning_rate,
            warmup_epochs=options.epochs // 10,
            seed=options.seed,
            progress=False,
        )
        estimate = pv.log_marginal(
            vae.model, vae.guide, test, num_samples=options.num_samples, keep_draws=0, seed=0
        )
        rate, elbo = estimate.rate.mean().item(), estimate.elbo.mean().item()
        active = int((pv.tasks.encode(vae.guide, test).var(0) > 0.01).sum())
        bits = [likelihood.bits_per_dimension(value) for value in (estimate.mean, elbo)]
        cells = [name, *(f"{value:.3f}" for value in bits), f"{rate:.1f}", str(active)]
        print("| " + " | ".join([*cells, f"{result.seconds:.0f}"]) + " |", flush=True)
        if options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
            drawn = pv.tasks.generate(vae.model, torch.zeros(48, *SHAPE), seed=0)
            rebuilt = pv.tasks.reconstruct(vae.model, vae.guide, test[:12], seed=0)
            title = f"{name}: means of p(x given z)"
            pv.plots.samples(drawn.numpy(), test.numpy(), title=title).savefig(
                options.folder / f"{name}-samples.png"
            )
            pv.plots.reconstructions(test[:12].numpy(), rebuilt.numpy(), title=title).savefig(
                options.folder / f"{name}-reconstructions.png"
            )
    print(f"| independent values | {histogram_bits(train, test):.3f} | | | | |")


if __name__ == "__main__":
    main()
