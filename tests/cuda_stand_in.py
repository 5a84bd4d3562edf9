"""A CUDA device made of the host's memory: what is CUDA's own in the code runs, and its faults show.

    python tests/cuda_stand_in.py --check
    python tests/cuda_stand_in.py -m pytest -m gpu
    python tests/cuda_stand_in.py SCRIPT.py ARGUMENTS

A stub of CUDA's runtime (``cuda_stand_in.c``) is loaded before torch, so that torch makes tensors on
``cuda:0`` whose memory is the host's. Each CUDA kernel of torch is replaced by one that computes the
same bytes on the CPU: below autograd, ``vmap``, recording and every mode. Like a GPU it

- refuses an operator of tensors on two devices, and a generator of another device;
- draws from CUDA's own generator, by its seed and its offset, and leaves the CPU's as it is;
- has memory that is NaN until it is written;
- gives results of a compiled step that are gone (NaN here) once the next step begins.

It counts the launches of each operator, and the waits for the device by the line that caused them.
It can't show speed, rounding, races, or what CUDA refuses to capture; ``torch.compile`` hands the
graph back as it is. ``STAND_IN_DEVICES=2`` makes two devices. It rests on private parts of torch, so
``--check`` comes first: status 0 where it holds, 75 (with a line that says why) where there can be
none, or where it fails on a version of torch that is not among those it is known on.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

# Minor versions of torch on which the check is known to pass: there it must.
KNOWN_ON = ("2.14",)
ABSENT = 75

_HERE = Path(__file__).resolve()
_ENVIRONMENT = ("LD_PRELOAD", "LD_LIBRARY_PATH", "CUDA_STAND_IN", "PYTORCH_NO_CUDA_MEMORY_CACHING")

# What happened on the device since the last ``clear``: operators launched, waits by (what, where).
launches: collections.Counter[str] = collections.Counter()
waits: collections.Counter[tuple[str, str]] = collections.Counter()

_is_installed = False


def is_active() -> bool:
    """Whether CUDA is the stand-in in this process."""
    return _is_installed


def clear() -> None:
    """Begin to count anew."""
    launches.clear()
    waits.clear()


# --- starting a process on it ----------------------------------------------------------------


def why_absent() -> str | None:
    """Say what is missing for a stand-in here; None: nothing."""
    import torch

    if not sys.platform.startswith("linux"):
        return "no Linux"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} has no CUDA build"
    if shutil.which("cc") is None:
        return "no C compiler"
    if _headers() is None:
        return "no headers of CUDA (they come with triton)"
    return None


def _headers() -> Path | None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    return folder if (folder / "driver_types.h").exists() else None


def _build_stub() -> Path:
    """Compile the stub, once for each of its texts; it also answers to the driver's name."""
    source = _HERE.with_suffix(".c")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"cuda_stand_in_{os.getuid()}_{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        fresh = folder / f"{os.getpid()}.so"
        options = ["-shared", "-fPIC", "-O1", "-I", str(_headers())]
        name = ["-Wl,-soname,libcuda.so.1", "-o", str(fresh)]
        subprocess.run(["cc", *options, str(source), *name], check=True)
        fresh.rename(library)
    return library


def _environment() -> dict[str, str]:
    """Return the environment of a process that is to run on the stand-in."""
    library = _build_stub()
    # Without torch's cache every tensor is allocated, and so is NaN at first.
    values = (str(library), str(library.parent), "1", "1")
    return os.environ | dict(zip(_ENVIRONMENT, values, strict=True))


def command(*arguments: str) -> list[str]:
    """Return the command of a child process on the stand-in; it finds its environment by itself."""
    return [sys.executable, str(_HERE), *arguments]


def main(arguments: list[str]) -> int:
    """Start this process again with the stub, or, where it is there, run what is asked for."""
    if "CUDA_STAND_IN" not in os.environ:
        reason = why_absent()
        if reason is not None:
            print(f"no stand-in for CUDA here: {reason}")
            return ABSENT
        os.execve(sys.executable, command(*arguments), _environment())
    if arguments == ["--check"]:
        return _check()
    install()
    sys.modules["cuda_stand_in"] = sys.modules["__main__"]
    sys.path[0] = os.getcwd() if arguments[0] == "-m" else str(Path(arguments[0]).parent)
    if arguments[:2] == ["-m", "pytest"]:
        import pytest

        return pytest.main(arguments[2:], plugins=[EveryTestRuns()])
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


# --- the device ------------------------------------------------------------------------------

# Operators that make or move no values: torch's own do, over the stub's memory.
_OWN = {"empty", "empty_strided", "resize_", "set_", "record_stream", "is_pinned", "_pin_memory"}
_OWN |= {"_efficientzerotensor"}
# Kernels that torch registers elsewhere but that must meet the checks all the same.
_BESIDES = ("aten::copy_", "aten::convolution", "aten::convolution_backward")
# Operators whose result, or its shape, the host has to know.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
_WAITING |= {"unique_consecutive", "bincount", "repeat_interleave", "histc"}
# Operators that are not pointwise and yet take a number as a CPU tensor without dimensions.
_TAKING_NUMBERS = {
    "where",
    "index_put_",
    "_index_put_impl_",
    "fill_",
    "masked_fill_",
    "addmm",
    "baddbmm",
}
# Operators that draw without torch's tag for those that do.
_DRAWING = {"randperm", "multinomial", "native_dropout", "_standard_gamma", "_sample_dirichlet"}
_DRAWING |= {"poisson", "binomial"}


class MixedDevicesError(RuntimeError):
    """An operator was given tensors that are on the device and tensors that are not."""


def install() -> None:
    """Replace torch's CUDA kernels, and ``torch.compile``, for the rest of the process."""
    import torch

    global _is_installed, _library
    torch.empty(1, device="cuda")
    # Children start without it, or through ``command``: one that inherits a part of it would die.
    for name in _ENVIRONMENT:
        os.environ.pop(name, None)
    _library = torch.library.Library("aten", "IMPL")
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    for name in (*registered, *_BESIDES):
        namespace, _, full = name.partition("::")
        base, _, overload = full.partition(".")
        if namespace != "aten" or base in _OWN or "sparse" in full:
            continue
        operator = getattr(getattr(torch.ops.aten, base), overload or "default")
        if not operator.is_view:  # a view computes nothing
            _library.impl(full, _kernel(operator, base), "CUDA", allow_override=True)
    torch.compile = _Compiled
    torch.compiler.cudagraph_mark_step_begin = _Compiled.begin_step
    _is_installed = True


def _on_host(tensor):
    """Return the same bytes as a tensor of the CPU."""
    import torch

    storage = tensor.untyped_storage()
    shared = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )
    place = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(shared, *place)


def _on_device(value, like):
    import torch

    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=like)
    _on_host(made).copy_(value)
    return made


def _kernel(operator, name):
    """Return what stands for a CUDA kernel: the CPU's, on the same memory."""
    import torch

    results = [argument.name for argument in operator._schema.arguments if argument.is_out]
    draws = torch.Tag.nondeterministic_seeded in operator.tags or name in _DRAWING

    takes = [str(argument.type) == "Tensor" for argument in operator._schema.arguments]

    def run(*args, **kwargs):
        with torch._C.DisableTorchFunction(), torch.no_grad():
            launches[name] += 1
            leaves = list(_leaves([*args, *kwargs.values()]))
            tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
            filled = [kwargs[result] for result in results]
            read = [value for value in tensors if not any(value is one for one in filled)]
            _check_devices(operator, name, args, read)
            place = next((v.device for v in tensors if v.is_cuda), torch.device("cuda"))
            generators = [value for value in leaves if isinstance(value, torch.Generator)]
            # What is filled may be read as well, so it is filled at the end.
            fresh = {result: torch.empty(0, dtype=kwargs[result].dtype) for result in results}
            hosts = {id(value): _on_host(value) for value in tensors if value.is_cuda}

            def to_host(value):
                if isinstance(value, torch.device):
                    return torch.device("cpu")
                if isinstance(value, torch.Generator):
                    return None
                return hosts.get(id(value), value)

            named = {key: _map(to_host, value) for key, value in kwargs.items()} | fresh
            with _cuda_draws(generators, place) if draws else contextlib.nullcontext():
                # Numbers reach some kernels as numbers, where they are declared as tensors.
                given = (
                    torch.tensor(value) if wanted and isinstance(value, int | float) else value
                    for value, wanted in zip(_map(to_host, args), takes, strict=False)
                )
                found = operator(*given, **named)
            for result, value in fresh.items():
                target = kwargs[result]
                if target.shape != value.shape:
                    target.resize_(value.shape)
                _on_host(target).copy_(value)
            origin = {id(hosts[id(value)]): value for value in tensors if id(value) in hosts}
            origin |= {id(fresh[result]): kwargs[result] for result in results}

            def to_device(value):
                if not isinstance(value, torch.Tensor):
                    return value
                return origin[id(value)] if id(value) in origin else _on_device(value, place)

            return _map(to_device, found)

    return run


def _leaves(values):
    """Yield what stands in lists and tuples, however deep."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _map(function, value):
    """Return the same lists and tuples with the function of what stands in them."""
    if isinstance(value, list | tuple):
        same = list if isinstance(value, list) else tuple
        return same(_map(function, one) for one in value)
    return function(value)


@contextlib.contextmanager
def _cuda_draws(generators, place):
    """Let the CPU's generator stand where CUDA's does, and move CUDA's on."""
    import torch

    if any(generator.device.type != "cuda" for generator in generators):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    index = torch.cuda.current_device() if place.index is None else place.index
    source = generators[0] if generators else torch.cuda.default_generators[index]
    state = torch.default_generator.get_state()
    seed = (source.initial_seed() * 1_000_003 + source.get_offset()) % 2**63
    torch.default_generator.manual_seed(seed)
    source.set_offset(source.get_offset() + 4)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _check_devices(operator, name, args, tensors):
    """Refuse what CUDA refuses to compute; note what the host has to wait for."""
    import torch

    elsewhere = [value for value in tensors if not value.is_cuda]
    if name == "copy_":
        if elsewhere and not any(args[2:]):  # the next argument: whether it is not to wait
            _note_wait("copy off the device" if args[1].is_cuda else "copy to the device")
        return
    indices = []
    if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):
        indices = [index for index in args[1] if index is not None]
    # Indices on the CPU are copied; a number on the CPU is handed over with the launch.
    moved = [v for v in elsewhere if indices and args[0].is_cuda and any(v is i for i in indices)]
    takes_numbers = torch.Tag.pointwise in operator.tags or name.startswith("_foreach")
    takes_numbers |= name in _TAKING_NUMBERS
    for value in elsewhere:
        is_number = value.dim() == 0 and takes_numbers
        if not is_number and not any(value is one for one in moved):
            shapes = ", ".join(f"{tuple(v.shape)} on {v.device}" for v in tensors)
            raise MixedDevicesError(
                f"Expected all tensors to be on the same device, got for {operator}: {shapes}"
            )
    are_masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    if moved or are_masks or name in _WAITING:
        _note_wait(f"{name} by CPU indices" if moved else f"{name} by a mask" if are_masks else name)


def _note_wait(what):
    """Count a wait for the line of the package that led to it."""
    frame, where = sys._getframe(1), "outside the package"
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/pyro_vae/")
        if found:
            where = f"{file}:{frame.f_lineno}"
            break
        frame = frame.f_back
    waits[what, where] += 1


class _Compiled:
    """A compiled function: the graph as it is, with results that the next step takes away."""

    _recorded: list[list] = []  # results of every recorded step of the process  # noqa: RUF012

    def __init__(self, graph, *, backend=None, options=None, **_):
        self.graph, self.results = graph, []
        options = options or {}
        self.records = backend == "cudagraphs" or bool(options.get("triton.cudagraphs"))
        self.thread = threading.current_thread()

    def __call__(self, *values):
        import torch

        found = self.graph(*values)
        if not self.records or not found[0].is_cuda:
            return found
        if threading.current_thread() is not self.thread:
            raise AssertionError("torch keeps the CUDA graphs of a thread to itself")
        if not self.results:
            self.results.extend(torch.empty_like(value) for value in found)
            self._recorded.append(self.results)
        pairs = zip(self.results, found, strict=True)
        return [kept.copy_(value).detach() for kept, value in pairs]

    @classmethod
    def begin_step(cls):
        """Take away what the steps before returned, as CUDA graphs that share memory do."""
        for results in cls._recorded:
            for value in results:
                value.fill_(float("nan"))


# --- the check -------------------------------------------------------------------------------


def _check() -> int:
    """Tell whether the stand-in computes, refuses and draws as it says."""
    import torch

    minor = ".".join(torch.__version__.split(".")[:2])
    try:
        install()
        for check in (_check_operators, _check_generators, _check_fit):
            check()
    except Exception:
        traceback.print_exc()
        print(f"the stand-in for CUDA fails its check on torch {torch.__version__}")
        if minor in KNOWN_ON:
            return 1
        print(f"stand-in not known on torch {torch.__version__}")
        return ABSENT
    print(f"the stand-in for CUDA holds on torch {torch.__version__}")
    return 0


def _check_operators() -> None:
    import torch

    x = torch.linspace(-2, 2, 12).view(3, 4)
    functions = [
        lambda v: v @ v.T + v.sum(),
        lambda v: torch.nn.functional.conv2d(v[None, None], v[None, None, :2, :2]),
        lambda v: torch.where(v > 0, v, v.exp()).cumsum(0).sort(descending=True)[0],
        lambda v: torch.linalg.cholesky(v @ v.T + torch.eye(3, device=v.device)),
        lambda v: torch.vmap(lambda row: row.softmax(0))(v),
        lambda v: v.clone().index_add_(0, torch.tensor([0, 2], device=v.device), v[:2])[1:],
        lambda v: torch.autograd.grad(v.requires_grad_().square().logsumexp(1).sum(), v)[0],
    ]
    for function in functions:
        on_device, on_host = function(x.clone().cuda()), function(x.clone())
        _expect(on_device.is_cuda, "results on the device")
        _expect(torch.equal(on_device.cpu(), on_host), "the CPU's values")
    _expect(torch.empty(9, device="cuda").isnan().all().item(), "fresh memory that is NaN")
    for mix in (lambda: x.cuda() + x, lambda: x @ x.T.cuda(), lambda: torch.cat([x, x.cuda()])):
        try:
            mix()
        except RuntimeError:
            continue
        _expect(False, "operators of two devices refused")
    clear()
    float(x.cuda(non_blocking=True).sum())
    _expect(waits.total() == 1, "one wait for one number")


def _check_generators() -> None:
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = torch.randn(5, device="cuda"), torch.randn(5, device="cuda")
    _expect(not torch.equal(first, second), "fresh numbers at every draw")
    _expect(torch.equal(before, torch.get_rng_state()), "the CPU's generator left alone")
    torch.manual_seed(3)
    _expect(torch.equal(first, torch.randn(5, device="cuda")), "the numbers of a seed again")
    state = torch.cuda.get_rng_state()
    third = torch.rand(5, device="cuda")
    torch.cuda.set_rng_state(state)
    _expect(torch.equal(third, torch.rand(5, device="cuda")), "the numbers of a state again")


def _check_fit() -> None:
    import torch

    import pyro_vae as pv

    torch.manual_seed(0)
    likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), (6,))
    family = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((6,), (8,)), 2)
    vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, family)
    x = torch.bernoulli(torch.full((64, 6), 0.9))
    result = pv.fit(vae.model, vae.guide, x, epochs=60, learning_rate=0.01, device="cuda", seed=0)
    elbo = result.history["train_elbo"]
    _expect(result.device == "cuda" and result.compiled, "a captured fit on the device")
    _expect(elbo[-1] > elbo[0] + 0.5, "a fit that learns")


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"expected {what}")


# --- as a plugin of pytest -------------------------------------------------------------------


class EveryTestRuns:
    """Makes a run fail in which a test that was chosen did not pass, skipped ones included."""

    def __init__(self) -> None:
        self.chosen = self.passed = 0

    def pytest_collection_finish(self, session) -> None:
        """Note how many tests are to run."""
        self.chosen = len(session.items)

    def pytest_runtest_logreport(self, report) -> None:
        """Count a test that passed."""
        self.passed += report.when == "call" and report.passed

    def pytest_sessionfinish(self, session, exitstatus) -> None:
        """Refuse a run without tests, or with one that was left out."""
        if exitstatus == 0 and not 0 < self.chosen == self.passed:
            print(f"\nexpected {self.chosen} tests that pass on the stand-in, got {self.passed}")
            session.exitstatus = 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
