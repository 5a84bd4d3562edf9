"""Time training of a Bernoulli VAE (784-512-256-20): Pyro, compiled Pyro, loops written by hand.

    python tests/benchmarks/training.py [--data-root DATA] [--device cuda] [--rounds 30] [--epochs 5]
    python tests/benchmarks/training.py --sizes 64 512 256 8 --batch-size 64 --epochs 0

Two tables. The first is of single steps on one batch: all contenders take the same number of steps in
every round, one after the other, so that a slow spell of the machine falls on all of them. Each has a
process of its own, as in use: parameters, moments and gradients of one just fit into a cache, and
several in one process slow each other down. The second table is of whole epochs of the 60,000 MNIST
images, batches drawn from a permutation and binarised afresh: ``pyro_vae.fit`` and the loop written
by hand take turns, epoch by epoch. Medians over the rounds, and
ratios taken within each round, with their quartiles. With a CUDA device it runs there, unless
``--device cpu`` is given. Libraries that are not installed are left out. Without ``--data-root`` the
epochs are of random grey values of the same shape, which cost the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.infer.compiled import CompiledTrace_ELBO
from pyro_vae.infer.optim import FusedOptim

PIXELS, WIDTHS, LATENT = 784, (512, 256), 20  # unless --sizes says otherwise
LEARNING_RATE = 1e-3

Step = Callable[[Tensor], float]


def set_sizes(pixels: int, *widths_and_latent: int) -> None:
    """Set the sizes of every network of this process."""
    global PIXELS, WIDTHS, LATENT
    PIXELS, (*widths, LATENT) = pixels, widths_and_latent
    WIDTHS = tuple(widths)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """The one network, as a Pyro pair and as a loss written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(PIXELS, *WIDTHS, 2 * LATENT)
        self.decoder = mlp(LATENT, *reversed(WIDTHS), PIXELS)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(LATENT), x.new_ones(LATENT)).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def loss(self, x: Tensor) -> Tensor:
        """The same estimate: both log-densities of z at the draw, not their closed-form KL."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        divergence = (0.5 * z**2 - 0.5 * noise**2 - log_scale).sum()
        fit = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return fit + divergence


def pyro_step(device: str, elbo: Trace_ELBO, optim: pyro.optim.PyroOptim) -> Step:
    vae = VAE().to(device)
    return SVI(vae.model, vae.guide, optim, elbo).step


def fused() -> FusedOptim:
    return FusedOptim(torch.optim.Adam, {"lr": LEARNING_RATE})


def hand_step(device: str, compile_mode: str | None) -> Step:
    vae = VAE().to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    loss_of = vae.loss if compile_mode is None else torch.compile(vae.loss, mode=compile_mode)

    def step(x: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def pythae_step(device: str) -> Step:
    import pythae.models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(PIXELS, *WIDTHS, 2 * LATENT)

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_variance = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(LATENT, *reversed(WIDTHS), PIXELS)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    config = pythae.models.VAEConfig(
        input_dim=(PIXELS,), latent_dim=LATENT, reconstruction_loss="bce"
    )
    vae = pythae.models.VAE(config, encoder=Encoder(), decoder=Decoder()).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        loss = vae({"data": x}).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def numpyro_step() -> Step:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from jax.example_libraries import stax

    def net(*sizes: int) -> tuple:
        layers = [layer for size in sizes[:-1] for layer in (stax.Dense(size), stax.Relu)]
        return stax.serial(*layers, stax.Dense(sizes[-1]))

    def model(x):
        decode = numpyro.module("decoder", net(*reversed(WIDTHS), PIXELS), (len(x), LATENT))
        with numpyro.plate("data", len(x)):
            prior = ndist.Normal(jnp.zeros(LATENT), 1.0).to_event(1)
            z = numpyro.sample("z", prior)
            numpyro.sample("x", ndist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = numpyro.module("encoder", net(*WIDTHS, 2 * LATENT), (len(x), PIXELS))
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(encode(x), 2, -1)
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    svi = numpyro.infer.SVI(
        model, guide, numpyro.optim.Adam(LEARNING_RATE), numpyro.infer.Trace_ELBO()
    )
    update = jax.jit(svi.update)
    state = None

    def step(x: Tensor) -> float:
        nonlocal state
        batch = jnp.asarray(x.cpu().numpy())
        if state is None:
            state = svi.init(jax.random.PRNGKey(0), batch)
        state, loss = update(state, batch)
        return float(loss)

    return step


CONTENDERS: dict[str, Callable[[str], Step]] = {
    "stock SVI": lambda device: pyro_step(
        device, Trace_ELBO(), pyro.optim.Adam({"lr": LEARNING_RATE})
    ),
    "stock SVI, FusedOptim": lambda device: pyro_step(device, Trace_ELBO(), fused()),
    "recorded SVI, FusedOptim": lambda device: pyro_step(
        device, CompiledTrace_ELBO(backend="eager"), fused()
    ),
    "compiled SVI, FusedOptim": lambda device: pyro_step(
        device, CompiledTrace_ELBO(compile_after=0), fused()
    ),
    "eager loop by hand": lambda device: hand_step(device, None),
    "compiled loop by hand": lambda device: hand_step(
        device, "reduce-overhead" if device == "cuda" else "default"
    ),
    "pythae": pythae_step,
    "NumPyro": lambda device: numpyro_step(),
}
LIBRARIES = {"pythae": "pythae", "NumPyro": "numpyro"}


def serve(
    name: str, device: str, batch_size: int, threads: int, sizes: list[int], asked: Connection
) -> None:
    """Take as many steps as asked, again and again, and answer with milliseconds per step."""
    set_sizes(*sizes)
    torch.set_num_threads(threads)
    pyro.set_rng_seed(0)
    x = torch.rand(batch_size, PIXELS).bernoulli().to(device)
    step = CONTENDERS[name](device)
    while length := asked.recv():
        for _ in range(3):
            step(x)
        start = time.perf_counter()
        for _ in range(length):
            step(x)
        asked.send((time.perf_counter() - start) / length * 1e3)


def measure(device: str, batch_size: int, rounds: int, length: int) -> dict[str, list[float]]:
    """Milliseconds per step of each contender in each round."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in CONTENDERS:
        if name not in LIBRARIES or importlib.util.find_spec(LIBRARIES[name]):
            ends[name], other = context.Pipe()
            sizes = [PIXELS, *WIDTHS, LATENT]
            arguments = (name, device, batch_size, torch.get_num_threads(), sizes, other)
            context.Process(target=serve, args=arguments, daemon=True).start()
            other.close()
            ends[name].send(length)  # builds, compiles, warms up
            ends[name].recv()
    times: dict[str, list[float]] = {name: [] for name in ends}
    for _ in range(rounds):
        for name, end in ends.items():
            end.send(length)
            times[name].append(end.recv())
    for end in ends.values():
        end.send(0)
    return times


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line for line in lines if "model name" in line).split(":")[1].strip()
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def report(times: dict[str, list[float]], unit: str, bases: tuple[str, ...]) -> str:
    header = f"{unit:26}" + "".join(f"{name:>26}" for name in ("time", *(f"to {b}" for b in bases)))
    lines = [header]
    for name, values in times.items():
        cells = [values]
        for base in bases:
            cells.append([v / b for v, b in zip(values, times[base], strict=True)])
        texts = []
        for cell in cells:
            low, middle, high = quartiles(cell)
            texts.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"{name:26}" + "".join(f"{text:>26}" for text in texts))
    return "\n".join(lines)


# --- epochs ----------------------------------------------------------------------------------


def images(data_root: str | None) -> Tensor:
    """The 60,000 training images as grey values in [0, 1], ``(60000, 784)``."""
    if data_root is None:
        return torch.rand(60_000, PIXELS)
    return pv.datasets.load("mnist", data_root, binarize="none", validation_size=0).train.flatten(1)


def hand_epochs(x: Tensor, batch_size: int, device: str) -> Callable[[], float]:
    """Seconds per epoch of the compiled loop, which binarises in its compiled loss."""
    vae = VAE().to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    mode = "reduce-overhead" if device == "cuda" else "default"
    # The odd last batch is a graph of its own.
    loss_of = torch.compile(lambda x: vae.loss(x.bernoulli()), mode=mode, dynamic=False)

    def epoch() -> float:
        start = time.perf_counter()
        total = torch.zeros((), device=device)
        for index in torch.randperm(len(x), device=device).split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(x[index])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()
        return time.perf_counter() - start

    return epoch


def measure_epochs(
    x: Tensor, epochs: int, batch_size: int, device: str
) -> tuple[dict[str, list[float]], str]:
    """Seconds per epoch of the two contenders in turns; the first of each warms up."""
    x = x.to(device)
    by_hand, seconds = hand_epochs(x, batch_size, device), []
    vae = VAE().to(device)
    result = pv.fit(
        vae.model,
        vae.guide,
        x,
        epochs=epochs + 1,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        transform=torch.bernoulli,
        compile=True,
        device=device,
        progress=False,
        on_epoch=lambda epoch, row: seconds.append(by_hand()),
    )
    times = {"compiled loop by hand": seconds[1:], "fit": list(result.history["seconds"][1:])}
    return times, result.compile_choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each contender; 0: none")
    parser.add_argument("--batch-size", type=int, default=128)
    text = "pixels, hidden widths of the encoder (the decoder mirrors them) and latent dimensions"
    sizes = [PIXELS, *WIDTHS, LATENT]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N", help=text)
    parser.add_argument("--data-root", help="folder of MNIST, as torchvision lays it out")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    set_sizes(*options.sizes)
    pyro.set_rng_seed(0)
    print(
        f"{hardware(device)}; torch {torch.__version__}, Pyro {pyro.__version__}; "
        f"{'-'.join(map(str, options.sizes))} Bernoulli VAE, batch {options.batch_size}; "
        "median [quartiles]\n"
    )
    if options.rounds:
        times = measure(device, options.batch_size, options.rounds, options.steps)
        bases = ("stock SVI", "compiled loop by hand")
        print(report(times, f"step, ms, {options.rounds} rounds", bases) + "\n")
    if options.epochs:
        x = images(options.data_root)
        times, choice = measure_epochs(x, options.epochs, options.batch_size, device)
        unit = f"epoch, s, {options.epochs} rounds"
        print(report(times, unit, ("compiled loop by hand",)) + f"\nfit: {choice}")


if __name__ == "__main__":
    main()
