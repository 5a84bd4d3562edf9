"""``pyro-vae autoencoder``: the deterministic baseline beside a VAE of the same networks."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyro_vae import plots
from pyro_vae.app import names
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.output import Page, print_line, print_table
from pyro_vae.app.pages import write_page
from pyro_vae.app.pictures import limits_of, save_picture
from pyro_vae.app.settings import as_record, build_vae, check_settings, fit_options, tell_defaults
from pyro_vae.app.study import open_study
from pyro_vae.autoencoder import LOSSES, Autoencoder, AutoencoderFit
from pyro_vae.datasets import Dataset
from pyro_vae.errors import check_name
from pyro_vae.infer.training import FitResult, fit
from pyro_vae.pair.functions import seeded
from pyro_vae.runs.files import RUNS, write_json
from pyro_vae.tasks.autoencoder_comparison import AutoencoderComparison, compare_autoencoder

_SEED = 0  # of what is drawn from the trained models

_HEADER = ["quantity", "autoencoder", "VAE"]
_CAPTION = "Test data: root-mean-square errors per value, median distances"
_SHOWN = "Reconstructions, decoded random latents, latents between the codes of four data points, "
_SHOWN += "and how far random latents are from the training codes."


def autoencoder(settings: TrainSettings, loss: str | None, *, output: Path) -> dict[str, Any]:
    """Train an autoencoder and a VAE on the same data and compare them; return what the JSON holds.

    Both start from the same weights of encoder and decoder. Writes ``autoencoder.png``,
    ``autoencoder.json`` and a page; the state of both trainings is kept below ``runs``.
    """
    settings = check_settings(settings)
    loss = loss or ("bce" if settings.likelihood in names.UNIT_INTERVAL else "mse")
    check_name("loss", loss, LOSSES)
    with open_study(output, {**asdict(settings), "loss": loss}, settings) as study:
        dataset = study.dataset
        settings = tell_defaults(settings, dataset.train, dataset.validation)
        comparison, fits = _train(settings, loss, dataset, study.folder / RUNS)
        curves = {side: made.history.items() for side, made in fits.items()}
        result = {
            "table": comparison.table(),
            "loss": loss,
            "history": {side: {n: c.tolist() for n, c in each} for side, each in curves.items()},
            "training_seconds": {side: made.seconds for side, made in fits.items()},
            "num_parameters": {side: made.num_parameters for side, made in fits.items()},
            **study.describe(as_record(settings)),
        }
        title = f"Autoencoder ({loss}) and VAE on {Path(dataset.name).name}: test data"
        data, sides = comparison.held_out.numpy(), (comparison.autoencoder, comparison.vae)
        figure = plots.autoencoder_and_vae(data, *sides, title=title, limits=limits_of(dataset))
        save_picture(figure, study.folder / "autoencoder.png")
        table = result["table"].items()
        rows: list[Any] = [(name, row["autoencoder"], row["vae"]) for name, row in table]
        rows.append(("training seconds", *result["training_seconds"].values()))
        page = Page(f"Autoencoder and VAE {study.folder.name}", subtitle=f"autoencoder's loss {loss}")
        page.section("Result")
        page.table(_HEADER, rows, caption=_CAPTION, decimals=3)
        page.figure(figure, caption=_SHOWN)
        write_page(page, study.folder, result)
        write_json(study.folder / "autoencoder.json", result)
        print_table(_CAPTION, _HEADER, rows, decimals=3)
        print_line(f"written: {study.folder}")
    return result


def _train(
    settings: TrainSettings, loss: str, dataset: Dataset, states: Path
) -> tuple[AutoencoderComparison, dict[str, AutoencoderFit | FitResult]]:
    """Train both on the same data, each from the state that is kept of it, and measure them."""
    options = fit_options(settings)
    shared = {name: options[name] for name in ("epochs", "batch_size", "learning_rate", "patience")}
    how: dict[str, Any] = {"device": settings.device, "resume": True}
    with seeded(settings.seed):
        vae: Any = build_vae(settings, dataset)
        encoder = copy.deepcopy(vae.variational_family.encoder)
        baseline = Autoencoder(encoder, copy.deepcopy(vae.likelihood.decoder))
        kept = states / "autoencoder"
        deterministic = baseline.fit(dataset, loss=loss, checkpoint=kept, **shared, **how)
        variational = fit(vae.model, vae.guide, dataset, checkpoint=states / "vae", **options, **how)
    device = next(vae.parameters()).device
    with seeded(_SEED):
        train = dataset.draw(dataset.train.to(device))
    test = dataset.test.to(device)
    comparison = compare_autoencoder(baseline, vae.model, vae.guide, train, test, seed=_SEED)
    return comparison, {"autoencoder": deterministic, "vae": variational}
