"""What comes out of a comparison: tables, figures, ArviZ's ranking."""

import io
import json
import math
import warnings

import matplotlib as mpl
import pyro
import pytest
import torch
from compared_pairs import QUICK, bits, pair_of, small_vae
from matplotlib.figure import Figure
from rich.console import Console

import pyro_vae as pv

NUM_DATA = 10


@pytest.fixture(scope="module")
def two():
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        first, second = small_vae(), small_vae(family="FullRankNormal")
        x = bits(NUM_DATA)  # few: each has its grid of the quadrature
        pairs = {"mean-field": pair_of(first), "full-rank": pair_of(second)}
        return pv.compare(
            pairs, x, train=x, fit_options={"epochs": 1}, posterior="quadrature", **QUICK
        )


def test_tables(two):
    text = str(two)
    for wanted in (
        "mean-field",
        "full-rank",
        "IWAE-50",
        "exact",
        "Monte Carlo",
        "quadrature",
        "epoch",
    ):
        assert wanted in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(two)
    assert "log p(x)" in console.export_text()
    frame = two.to_dataframe()
    assert list(frame.index) == ["mean-field", "full-rank"]
    assert frame.loc["full-rank", "log_prob"] == two.per_datum("full-rank").mean
    plain = json.loads(json.dumps(two.to_dict(per_datum=True), allow_nan=False))
    assert plain["pairs"]["mean-field"]["elbo"] == two.per_datum("mean-field", "elbo").mean
    assert len(plain["pairs"]["mean-field"]["per_datum"]["log_prob"]) == NUM_DATA
    assert plain["num_data"] == NUM_DATA
    assert "per_datum" not in two.to_dict()["pairs"]["mean-field"]


def test_figures(two):
    assert isinstance(two.plot(), Figure)
    assert isinstance(two.plot("elbo"), Figure)
    figure = two.scatter("mean-field", "full-rank")
    points = figure.axes[0].collections[0].get_offsets()
    assert points.shape == (NUM_DATA, 2)
    assert points[3, 1] == two.per_datum("full-rank").value[3]


def test_arviz_compares_them_as_they_are(two):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its own changes as warnings
        mpl.use("Agg")
        import arviz

        kept = {} if hasattr(arviz, "from_pystan") else {"round_to": "none"}
        table = arviz.compare(two.to_arviz(), **kept)
        arviz.plot_compare(table)
    worst = next(name for name in two.pairs if name != two.best())
    difference = two.difference(worst)
    assert table.index[0] == two.best()
    assert abs(table.loc[worst, "elpd_diff"]) == pytest.approx(-NUM_DATA * difference.mean, rel=1e-6)
    paired = two.per_datum(worst).value - two.per_datum(two.best()).value
    assert table.loc[worst, "dse"] == pytest.approx(
        math.sqrt(NUM_DATA) * paired.std(correction=0).item(), rel=1e-6
    )


def test_annealing_is_left_out_where_it_does_not_apply():
    guide = pv.guides.VonMisesFisher(pv.networks.MLPEncoder((6,), (8,)), 2)
    sphere = pv.VAE(
        pv.priors.HypersphericalUniform(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), (6,)),
        guide,
    )
    told = []
    comparison = pv.compare(
        {"sphere": pair_of(sphere), "normal": pair_of(small_vae())},
        bits(5),
        methods=("importance", "annealed"),
        annealing_options={"num_steps": 5, "num_chains": 2, "start": "guide"},
        progress=lambda *what: told.append(what),
        **QUICK,
    )
    assert comparison.pairs["sphere"].annealed is None
    assert comparison.pairs["normal"].annealed is not None
    assert comparison.ranked_by == "log_prob"
    assert "does not apply" in str(comparison)
    assert ("normal", "log p(x), annealed", 1.0) in told
