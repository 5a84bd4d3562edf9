"""A VAE as plain values, and back: registered classes and their settings, nothing else."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.errors import InputError, first_line, unknown_name
from pyro_vae.runs.files import CONFIG, FORMAT
from pyro_vae.vae import VAE, ConditionalVAE
from pyro_vae.version import __version__

# The parts of a VAE, in the order they are built: a prior may use the variational family.
_PARTS = ("variational_family", "prior", "likelihood")
Components = Mapping[str, type[nn.Module]]

_FLOATS, _OTHERS = "float16 bfloat16 float32 float64", "int8 int16 int32 int64 uint8 bool"
_DTYPES = {name: getattr(torch, name) for name in f"{_FLOATS} {_OTHERS}".split()}

# Elements that building may fill for each of the weights (masks, starting values), and at the least.
_PER_WEIGHT, _ELEMENTS_AT_LEAST = 16, 1 << 20
# What a tensor counts at the least: a million layers of one unit must not take minutes to build.
_PER_TENSOR = 256
# Largest size among a registered class's settings beside few weights; some weight has each of them.
_LARGEST_SIZE = 1 << 20
# What constructors raise that are given something else than they expect.
_UNBUILDABLE = (
    *(LookupError, TypeError, AttributeError, ValueError, RuntimeError),
    *(ArithmeticError, AssertionError, MemoryError),
)


def describe(vae: VAE, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the plain values that a VAE can be built from again, with ``settings`` as its run's."""
    shared: dict[int, str] = {}
    model: dict[str, Any] = {}
    for part in _PARTS:
        component = getattr(vae, part)
        model[part] = _describe(component, shared)
        shared[id(component)] = part
    if isinstance(vae, ConditionalVAE):
        model["conditional"] = {"num_classes": vae.num_classes}
    return {"format": FORMAT, "pyro_vae": __version__, "model": model, "run": dict(settings or {})}


def build(config: dict[str, Any], components: Components, num_weights: int) -> VAE:
    """Build a VAE from what :func:`describe` returned, and the caller's own classes by name."""
    parts: dict[str, Any] = {}
    try:
        most = max(_ELEMENTS_AT_LEAST, _PER_WEIGHT * num_weights)
        told = f"{CONFIG} describes networks far larger than the weights beside it"
        refusal = f"expected settings that fit the weights, {told}: the two are not from one run"
        with torch.device("cpu"), Bounded(most, refusal, max(_LARGEST_SIZE, num_weights)) as bound:
            for part in _PARTS:
                parts[part] = _build(config["model"][part], components, parts, bound)
                if not isinstance(parts[part], nn.Module):
                    raise InputError(f"expected a class for the {part} in {CONFIG}, got none")
            components_of = (parts["prior"], parts["likelihood"], parts["variational_family"])
            if "conditional" not in config["model"]:
                return VAE(*components_of)
            return ConditionalVAE(*components_of, **config["model"]["conditional"])
    except InputError:
        raise
    except _UNBUILDABLE as error:
        wanted = f"a description of a VAE in {CONFIG}"
        got = type(error).__name__
        raise InputError(f"expected {wanted}, got {got}: {first_line(error)}") from error


def known_to(earlier: Any, described: Any) -> Any:
    """Return a description without the settings that an earlier version's lacks and that are off."""
    if not (isinstance(earlier, dict) and isinstance(described, dict)):
        return described
    kept = {name: value for name, value in described.items() if name in earlier or value}
    return {name: known_to(earlier.get(name), value) for name, value in kept.items()}


class Bounded(TorchFunctionMode):
    """Refuse, in these words, to make more elements than so many: settings may ask for any size."""

    _MAKERS: tuple[Callable[..., Any], ...] = (
        *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint),
        *(torch.arange, torch.linspace, torch.eye, torch.randperm),
        *(torch.tril_indices, torch.triu_indices),
    )

    def __init__(self, most: int, refusal: str, largest_size: int = 0) -> None:
        super().__init__()
        self.left, self.refusal, self.largest_size = most, refusal, largest_size

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a constructor of tensors is about to make."""
        kwargs = kwargs or {}
        if function in self._MAKERS:
            self.left -= max(_PER_TENSOR, function(*args, **{**kwargs, "device": "meta"}).numel())
            self._check(self.left >= 0)
        return function(*args, **kwargs)

    def check_size(self, value: Any) -> None:
        """Refuse a setting that is a size no weight has."""
        for number in value if isinstance(value, tuple) else (value,):
            self._check(not isinstance(number, int) or abs(number) <= self.largest_size)

    def _check(self, fits: bool) -> None:
        if not fits:
            raise InputError(self.refusal)


def _registry() -> dict[str, type[nn.Module]]:
    kinds = (networks, priors, likelihoods, guides)
    members = {f"{kind.__name__}.{n}": getattr(kind, n) for kind in kinds for n in kind.__all__}
    named = ((name.removeprefix("pyro_vae."), member) for name, member in members.items())
    return {n: m for n, m in named if inspect.isclass(m) and issubclass(m, nn.Module)}


def _describe(component: Any, shared: dict[int, str]) -> Any:
    """Describe a component or one of its settings by plain values."""
    if id(component) in shared:
        return {"shared": shared[id(component)]}
    if isinstance(component, nn.Module):
        names, kind = {member: name for name, member in _registry().items()}, type(component)
        settings = {}
        for name, parameter in inspect.signature(kind).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue  # inherited by a component without a constructor of its own
            if not hasattr(component, name):
                raise InputError(
                    f"expected {kind.__name__} to keep its argument {name!r} as an attribute: set "
                    f"self.{name} = {name} so that it can be saved"
                )
            settings[name] = _describe(getattr(component, name), shared)
        return {"class": names.get(kind, f"custom.{kind.__name__}"), "settings": settings}
    if isinstance(component, Tensor) and str(component.dtype).removeprefix("torch.") in _DTYPES:
        tensor = component.detach()
        values = [_describe(value, {}) for value in tensor.flatten().tolist()]  # to the bit
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"tensor": {"dtype": dtype, "shape": list(tensor.shape), "values": values}}
    if isinstance(component, float) and not math.isfinite(component):
        return {"float": str(float(component))}  # JSON has no number for it
    if component is None or isinstance(component, bool | int | float | str):
        return component
    if isinstance(component, list | tuple):
        return [_describe(inner, shared) for inner in component]
    wanted = "components and settings that can be saved"
    advice = "write it as a module (see pyro_vae.priors.Prior) or save its state_dict yourself"
    raise InputError(f"expected {wanted}, got {type(component).__name__}: {advice}")


def _build(description: Any, components: Components, parts: dict[str, Any], bound: Bounded) -> Any:
    """Build what :func:`_describe` described."""
    if isinstance(description, list):
        return tuple(_build(inner, components, parts, bound) for inner in description)
    if not isinstance(description, dict):
        return description
    if "shared" in description:
        return parts[description["shared"]]
    if "tensor" in description:
        tensor = description["tensor"]
        values = _build(tensor["values"], components, parts, bound)
        return torch.tensor(values, dtype=_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    if "float" in description:
        return float(description["float"])
    name = description["class"]
    registered = _registry().get(name)
    kind = registered or components.get(name.removeprefix("custom."))
    if kind is None and not name.startswith("custom."):
        raise unknown_name("component", name, _registry())
    if kind is None and not (own := name.removeprefix("custom.")[:80]).isidentifier():
        raise InputError(f"expected the name of a class in {CONFIG}, got {own!r}: it is no run's")
    if kind is None:
        told = f"pass components={{{own!r}: {own}}}"
        raise InputError(f"expected the class of component {own!r}: {told}")
    told = description["settings"].items()
    settings = {key: _build(value, components, parts, bound) for key, value in told}
    for value in settings.values() if registered else ():
        bound.check_size(value)
    return kind(**settings)
