"""Data with missing values: the likelihood of what was observed, for any pair as it stands."""

from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor, nn

from pyro_vae.errors import InputError
from pyro_vae.pair.functions import PairFunction, owned_modules
from pyro_vae.pair.inputs import Inputs
from pyro_vae.tasks.observed_parts import elementwise_base, part_observed, take_part


def nan_as_missing(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return data with 0 in place of NaN, and where NaN was: the inputs of :func:`observed_pair`.

    Both are ``(N, *data_shape)``, the second boolean.
    """
    missing = x.isnan()
    return x.masked_fill(missing, 0.0), missing


def observed_pair(
    model: PairFunction, guide: PairFunction, *, observed: str | None = None, position: int = 0,
    fill: float | Tensor = 0.0, nan: bool = False,
) -> tuple[PairFunction, PairFunction]:  # fmt: skip
    r"""Turn a pair for whole data into one for data with missing values.

    .. math:: \log p(x_{obs}, z) = \log p(z) + \sum_{i \text{ observed}} \log p(x_i | z)

    The result is a pair like any other, whose last input is ``missing``: ``pyro_vae.fit`` trains it
    on incomplete data, ``pyro_vae.log_marginal`` estimates log p(x_obs) by it. Values are taken to be
    missing for reasons that don't depend on them. The guide is given the data with ``fill`` in the
    hidden places; where nothing is hidden, every number is the whole pair's.

    Args:
        model: a generative function whose observed site is elementwise given the latents.
        guide: its variational function.
        observed: name of the site that observes the data; by default all that observe the very
            input or a part of it, such as ``x[:, t]``.
        position: which of the pair's own inputs has missing values.
        fill: what the guide sees in hidden places: a number, or a tensor that broadcasts to the data.
        nan: values are missing where the incomplete input is NaN; there is no input ``missing``.

    Returns:
        model and guide, called with the pair's own inputs and then, unless ``nan`` is set,
        ``missing`` (boolean, of the shape of the incomplete input, which may hold anything there).

    Raises:
        InputError: when called: no such site, one not elementwise, or a ``missing`` that doesn't fit.

    Source:
        Mattei, Frellsen 2019, "MIWAE: deep generative modelling and imputation of incomplete data
        sets", equations 4 and 5; Nazabal et al. 2020, "Handling incomplete heterogeneous data using
        VAEs", section 3.

    Example:
        >>> import pyro_vae as pv
        >>> prior, encoder = pv.priors.StandardNormal(2), pv.networks.MLPEncoder((4,), (8,))
        >>> likelihood = pv.likelihoods.Gaussian(pv.networks.MLPDecoder(2, (8,)), (4,))
        >>> vae = pv.VAE(prior, likelihood, pv.guides.MeanFieldNormal(encoder, 2))
        >>> x = torch.tensor([[0.1, torch.nan, 0.3, 0.4]]).expand(16, 4)
        >>> pair = observed_pair(vae.model, vae.guide)
        >>> result = pv.fit(*pair, nan_as_missing(x), epochs=2, seed=0)
    """
    fill_in = partial(_fill_hidden, position, fill, nan)
    observed_model = partial(_run_model, model, fill_in, observed, position)
    observed_guide = partial(_run_guide, guide, fill_in)
    owners = owned_modules(model, guide)
    if not owners:
        return observed_model, observed_guide
    owner = _Owner(observed_model, observed_guide, owners)
    return owner.model, owner.guide


def on_observed_part(model: PairFunction, *, observed: str | None, position: int) -> PairFunction:
    """Return the model of the observed part; arguments and errors as for :func:`observed_pair`."""

    def masked(*inputs: Tensor) -> Any:
        *given, missing = inputs
        given[position] = given[position].contiguous()
        with _ObservedPart(given[position], missing, observed):
            return model(*given)

    return masked


def check_missing(x: Tensor, missing: Tensor) -> None:
    """Refuse a ``missing`` that is not boolean or not of the data's shape."""
    if not isinstance(missing, Tensor) or missing.dtype is not torch.bool:
        got = missing.dtype if isinstance(missing, Tensor) else type(missing).__name__
        raise InputError(f"expected missing as a boolean tensor, got {got}: e.g. x.isnan()")
    if missing.shape != x.shape:
        wanted = f"missing of the data's shape {tuple(x.shape)}"
        advice = "expand it, or say with position= which input it belongs to"
        raise InputError(f"expected {wanted}, got {tuple(missing.shape)}: {advice}")


class _ObservedPart(Messenger):
    """Leave the hidden values out of the density of the site that observes ``x``."""

    def __init__(self, x: Tensor, missing: Tensor, name: str | None) -> None:
        super().__init__()
        self.x, self.missing, self.name = x, missing.contiguous(), name
        self.found = False

    def _pyro_sample(self, message: Any) -> None:
        name, value = message["name"], message["value"]
        if not message["is_observed"] or site_is_factor(message):
            return
        place = part_observed(value, self.x)
        if place is None if self.name is None else name != self.name:
            return
        self.found = True
        missing = self.missing if place is None else take_part(self.missing, place)
        base, event_dim = elementwise_base(name, message["fn"])
        if base.batch_shape != missing.shape or value.shape != missing.shape:
            wanted = (
                f"site {name!r} to observe the input or a part of it, shape {tuple(missing.shape)}"
            )
            got = f"values of shape {tuple(value.shape)} under a distribution of"
            advice = "move the reshaping out of the model"
            raise InputError(f"expected {wanted}, got {got} {tuple(base.batch_shape)}: {advice}")
        # NaN under a mask would still make NaN gradients, and a value outside the support an error.
        message["value"] = torch.where(missing, _inside(base, value), value)
        message["fn"] = base.mask(~missing).to_event(event_dim)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and not self.found:
            wanted = "one of the input or a part of it" if self.name is None else repr(self.name)
            advice = "name the site with observed=, and the input with position="
            raise InputError(f"expected an observed site, {wanted}, the model has none: {advice}")


def _run_model(model: PairFunction, fill: Any, observed: Any, position: int, *inputs: Tensor) -> Any:
    return on_observed_part(model, observed=observed, position=position)(*fill(*inputs))


def _run_guide(guide: PairFunction, fill: Any, *inputs: Tensor) -> Any:
    return guide(*fill(*inputs)[:-1])


class _Owner(nn.Module):
    """Owns the modules of a wrapped pair, so that they are moved, and copied with its functions."""

    def __init__(self, model: PairFunction, guide: PairFunction, owners: list[nn.Module]) -> None:
        super().__init__()
        self._model, self._guide = model, guide
        self.owners = nn.ModuleList(owners)

    def model(self, *inputs: Tensor) -> Any:
        return self._model(*inputs)

    def guide(self, *inputs: Tensor) -> Any:
        return self._guide(*inputs)


def _fill_hidden(position: int, fill: float | Tensor, nan: bool, *inputs: Tensor) -> Inputs:
    """Return the inputs with ``fill`` in the hidden places, and then ``missing``."""
    inputs = (*inputs, inputs[position].isnan()) if nan and position < len(inputs) else inputs
    if not 0 <= position < len(inputs) - 1:
        got = f"{len(inputs)} tensors for position {position}"
        raise InputError(f"expected the pair's inputs and then missing, got {got}: pass (x, missing)")
    x, missing = inputs[position], inputs[-1]
    check_missing(x, missing)
    if isinstance(fill, Tensor):
        filled = torch.where(missing, fill.to(x), x)
    else:
        filled = x.masked_fill(missing, fill)
    return (*inputs[:position], filled, *inputs[position + 1 :])


def _inside(base: Any, value: Tensor) -> Tensor:
    """Return values inside the support of a distribution: its means, rounded if it is discrete."""
    try:
        centre = base.mean
    except NotImplementedError:
        centre = base.sample()
    centre = centre.round() if base.support.is_discrete else centre
    return centre.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(value.dtype)
