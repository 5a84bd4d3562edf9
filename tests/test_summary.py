"""What results show of themselves: the numbers that matter, in few lines and as a table."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.summary import as_html, brief, plus_minus


def normal_pair():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + loc, 0.45).to_event(1))

    return model, guide


@pytest.fixture(scope="module")
def results():
    pyro.clear_param_store()
    torch.manual_seed(0)
    pair, x = normal_pair(), torch.randn(300, 2)
    hidden = torch.zeros(4, 2, dtype=torch.bool)
    hidden[:, 0] = True
    few = {"num_draws": 2, "num_steps": 4, "seed": 0}
    found = {
        "fit": pv.fit(*pair, x, epochs=2, seed=0, compile=False),
        "estimate": pv.log_marginal(*pair, x, num_samples=50, seed=0),
        "representation": pv.evaluation.representation(*pair, x[:60], seed=0),
        "bracket": pv.evaluation.bidirectional(*pair, x[:5], num_chains=4, num_steps=5, seed=0),
        "calibration": pv.evaluation.calibration(*pair, x, num_data=100, num_draws=19, seed=0),
        "completion": pv.tasks.complete(*pair, x[:4], hidden, **few),
        "divergence": pv.evaluation.posterior_divergence(*pair, x[:3], num_points=41),
        "comparison": pv.compare({"a": pair, "b": pair}, x, num_samples=50, seed=0),
        "predictive": pv.evaluation.posterior_predictive(*pair, x[:5], num_draws=3, seed=0),
        "aggregate": pv.evaluation.aggregate_posterior(*pair, x, seed=0),
    }
    return found | {"data": pv.datasets.load("digits", seed=0)}


def test_no_result_prints_more_than_a_screen(results):
    for name, result in results.items():
        lines = repr(result).splitlines()
        assert 1 < len(lines) <= 25, name
        assert "tensor(" not in repr(result), name
        assert str(result) == repr(result), name


def test_every_result_is_a_table_in_a_notebook(results):
    for name, result in results.items():
        page = result._repr_html_()
        assert page.count("<tr>") == page.count("</tr>") > 1, name


def test_an_estimate_tells_mean_errors_trust_and_what_to_do(results):
    estimate = results["estimate"]
    text = repr(estimate)
    mean, error = re.search(r"mean +(\S+) ± (\S+) nats", text).groups()
    assert float(mean) == pytest.approx(estimate.mean, abs=float(error) / 10)
    assert float(error) == pytest.approx(estimate.mean_standard_error, rel=0.1)
    assert f"{300 - estimate.num_unreliable} of 300 data points" in text
    assert ('method="auto"' in text) == (estimate.num_unreliable > 0)


def test_a_fit_tells_its_warnings_and_the_epoch_kept(results):
    text = repr(results["fit"])
    assert "2 epochs on cpu" in text
    assert f"{results['fit'].history['train_elbo'][-1]:.2f}" in text


def test_a_data_set_tells_its_parts(results):
    text = repr(results["data"])
    assert "1,294 data points" in text
    assert "10 classes" in text


def test_a_number_with_its_error_is_a_number_where_one_is_wanted(results):
    rate = results["representation"].rate
    assert float(rate) == rate.value
    assert f"{rate:.3f}" == f"{rate.value:.3f}"
    assert f"{rate}" == str(rate) == plus_minus(rate.value, rate.standard_error)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((1.23456, 0.0123), "1.235 ± 0.012"),
        ((-24.3, 0.4), "-24.30 ± 0.40"),
        ((1234.5, 56.0), "1234 ± 56"),
        ((0.25, 0.0), "0.2500 ± 0"),
        ((float("nan"), float("nan")), "nan ± unknown"),
    ],
)
def test_a_number_has_the_digits_of_its_error(numbers, text):
    assert plus_minus(*numbers) == text


def test_values_in_brief():
    assert brief(torch.tensor([[1.0, float("nan"), 3.0]])) == "(1, 3), from 1 to 3"
    assert brief(torch.tensor(2.5)) == "2.5"
    assert brief(None) == ""
    assert brief("a\nb") == "a..."
    assert brief(torch.zeros(2, dtype=torch.bool)) == "(2,)"


def test_text_of_a_result_is_not_taken_for_html():
    class Odd:
        def _summary(self):
            return "<b>", {"a & b": "<script>"}

    assert as_html(Odd()).count("&lt;") == 2
    assert "<script>" not in as_html(Odd())
