"""Mutated files given to the loaders: an error of one line or an equal result, nothing else."""

import io
import json
import random
import shutil
import struct
import warnings
import zipfile

import numpy as np
import pyro
import pytest
import torch
from command_line import run, sketching
from safetensors.torch import load_file, save_file
from saved_pairs import functions, make_x, weigh

import pyro_vae as pv
from pyro_vae.app import study, sweep
from pyro_vae.app.compare import load_measured
from pyro_vae.app.run_folder import open_run, read_run
from pyro_vae.runs.description import describe
from pyro_vae.runs.weights import read_weights, write_weights

SHAPE = (1, 4, 4)
CASES = 200


@pytest.fixture
def cases(request):
    return request.config.getoption("--cases") or CASES


def make_vaes():
    """Return VAEs that between them have every kind of setting and every kind of weight."""
    encoder = pv.networks.MLPEncoder(SHAPE, (6,))
    family = pv.guides.InverseAutoregressiveFlow(encoder, 2, hidden=(4,), context_features=3)
    pixels = pv.networks.ConvDecoder(2, SHAPE, (3, 2), activation="elu")
    yield pv.VAE(
        pv.priors.VampPrior(family, SHAPE, num_pseudo_inputs=3, learn_weights=True),
        pv.likelihoods.Gaussian(pixels, SHAPE, sigma="per-pixel", floor=0.01),
        family,
    )
    yield pv.VAE(
        pv.priors.GaussianMixture(3, 4),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(3, (5, 6)), SHAPE),
        pv.guides.MixtureOfNormals(pv.networks.ConvEncoder(SHAPE, (2,), features=4), 3),
    )
    yield pv.VAE(
        pv.priors.StandardNormal(2, scale=0.5),
        pv.likelihoods.Gaussian(pv.networks.MLPDecoder(2, (5,)), SHAPE, sigma=0.25),
        pv.guides.MeanFieldNormal(encoder, 2),
    ).double()


def flip_bits(content, draw):
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        position = draw.randrange(len(content))
        content[position] ^= 1 << draw.randrange(8)


def set_bytes(content, draw):
    start = draw.randrange(len(content))
    content[start : start + draw.choice([1, 4, 64])] = draw.randbytes(draw.choice([1, 4, 64]))


def cut_off(content, draw):
    del content[draw.randrange(len(content)) :]


def take_out(content, draw):
    start = draw.randrange(len(content))
    del content[start : start + draw.choice([1, 8, 100])]


def put_in(content, draw):
    start = draw.randrange(len(content) + 1)
    content[start:start] = draw.choice([b"\0", b"}", b"[[[[", b"NaN", draw.randbytes(16)])


def repeat_part(content, draw):
    start, end = sorted(draw.randrange(len(content)) for _ in range(2))
    content[start:start] = content[start:end]


def swap_parts(content, draw):
    first, second = draw.randrange(len(content)), draw.randrange(len(content))
    content[first], content[second] = content[second], content[first]


def zero_out(content, draw):
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice([1, 4, 64, 10_000]))
    content[start:end] = bytes(end - start)


BYTES = [flip_bits, set_bytes, cut_off, take_out, put_in, repeat_part, swap_parts, zero_out]


def mutate_bytes(path, draw):
    content = bytearray(path.read_bytes())
    draw.choice(BYTES)(content, draw)
    path.write_bytes(content)


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**70), 10**19, 0.0, 0.5, -0.5, 1e308),
    *("", "x", "../x", "os.system", "inf", "learned", "relu", "\0", "\ud800", "\n", "networks.Head"),
    *([], {}, [[]], [1, 2], {"a": 1}, {"shared": "prior"}, {"shared": []}, {"float": "nan"}),
    *({"float": "1" * 400}, {"float": []}, {"class": "priors.Prior", "settings": {}}),
    {"class": "networks.MLPEncoder", "settings": {"data_shape": [1, 4, 4]}},
    {"tensor": {"dtype": "float32", "shape": [2], "values": [1.0, 2.0]}},
    {"tensor": {"dtype": "float32", "shape": [2**31, 2**31], "values": [1.0]}},
    {"tensor": {"dtype": "load", "shape": [-1], "values": {}}},
    {"tensor": [1, 2]},
]


def places(value, path=()):
    """Return the path of everything inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


def mutate_settings(path, draw):
    config = json.loads(path.read_text())
    *inside, key = draw.choice(places(config))
    holder = config
    for step in inside:
        holder = holder[step]
    how = draw.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif how == 2:
        holder[key] = [holder[key]]
    else:
        holder[key] = draw.choice(ODD_VALUES)
    path.write_text(json.dumps(config))


def mutate_header(path, draw):
    """Change the header of the weights and keep its length right."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    *inside, key = draw.choice(places(header))
    holder = header
    for step in inside:
        holder = holder[step]
    if draw.randrange(4) == 0:
        del holder[key]
    else:
        values = [*ODD_VALUES, "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", [2, 2]]
        holder[key] = draw.choice(values)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def mutate_tensors(path, draw):
    """Write well-formed weights that are not the model's."""
    weights = load_file(path)
    name = draw.choice(list(weights))
    value = weights.pop(name)
    how = draw.randrange(6)
    if how == 0:
        weights[f"{name}x"] = value
    elif how == 1:
        weights[name] = value.reshape(-1)
    elif how == 2:
        weights[name] = value.to(draw.choice([torch.float16, torch.int32, torch.bool]))
    elif how == 3 and value.is_floating_point():
        value.reshape(-1)[0] = draw.choice([np.nan, np.inf, -np.inf, 7.0])
        weights[name] = value
    elif how == 4:
        weights |= {name: value, "more": torch.zeros(draw.randrange(3))}
    metadata = draw.choice([None, {}, {"checksum": "0" * 64}, {"format": "pt"}])
    save_file(weights, path, metadata)


MUTATIONS = [
    ("config.json", mutate_bytes),
    ("config.json", mutate_settings),
    ("model.safetensors", mutate_bytes),
    ("model.safetensors", mutate_header),
    ("model.safetensors", mutate_tensors),
]


def is_equal(first, second):
    state, other = first.state_dict(), second.state_dict()
    same_weights = state.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype
        for name, value in state.items()
    )
    return same_weights and describe(first)["model"] == describe(second)["model"]


def test_a_mutated_run_gives_one_clear_error_or_an_equal_model(tmp_path, cases, record_property):
    originals = []
    for index, vae in enumerate(make_vaes()):
        folder = pv.save(vae, tmp_path / f"original-{index}")
        originals.append((folder, pv.load(folder)))
    draw = random.Random(0)
    refused = 0
    for number in range(cases):
        folder, original = draw.choice(originals)
        mutated = tmp_path / "mutated"
        shutil.rmtree(mutated, ignore_errors=True)
        shutil.copytree(folder, mutated)
        name, mutate = draw.choice(MUTATIONS)
        mutate(mutated / name, draw)
        before = torch.get_rng_state()
        try:
            loaded = pv.load(mutated)
        except pv.InputError as error:
            refused += 1
            problem = "" if 10 < len(str(error)) < 1000 and "\n" not in str(error) else str(error)
        else:
            problem = "" if is_equal(loaded, original) else "another model"
        assert not problem, f"case {number}, {mutate.__name__} of {name}: {problem}"
        assert torch.equal(torch.get_rng_state(), before)
    record_property("refused", refused)
    assert refused > 0.5 * cases


def mutate_description(path, draw):
    """Change what a pair's file says of it, and sign the weights beside it anew."""
    weights, _ = read_weights(path.parent)
    mutate_settings(path, draw)
    named = json.loads(path.read_text()).get("pair")
    write_weights(path.parent, named, weights)


def test_a_mutated_pair_gives_one_clear_error_or_the_same_pair(tmp_path, cases, record_property):
    pv.fit(*(pair := functions()), make_x(), epochs=1, seed=0)
    original, mutated = pv.save_pair(*pair, tmp_path / "original"), tmp_path / "mutated"
    expected, draw, refused = weigh(*pair), random.Random(0), 0
    mutations = [*MUTATIONS, ("config.json", mutate_description)]
    for number in range(cases):
        shutil.rmtree(mutated, ignore_errors=True)
        shutil.copytree(original, mutated)
        name, mutate = draw.choice(mutations)
        mutate(mutated / name, draw)
        pyro.clear_param_store()
        other, problem = functions(), ""
        try:
            pv.load_pair(mutated, *other)
        except pv.InputError as error:
            refused += 1
            problem = "" if 10 < len(str(error)) < 1000 and "\n" not in str(error) else str(error)
        else:
            signed = (
                mutate is mutate_description
            )  # that may be another pair, but one that can be used
            if signed:
                dict(pyro.get_param_store().items())
            elif not torch.equal(weigh(*other), expected):
                problem = "another pair"
        assert not problem, f"case {number}, {mutate.__name__} of {name}: {problem}"
    record_property("refused", refused)
    assert refused > 0.5 * cases


def npy_bytes(array, version):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


def array_files(draw):
    array = np.linspace(0, 1, 120, dtype=draw.choice(["f4", "f8", ">f2"])).reshape(20, 6)
    version = draw.choice([(1, 0), (2, 0), (3, 0)])
    if draw.randrange(2):
        return ".npy", npy_bytes(array, version)
    stream = io.BytesIO()
    kind = draw.choice(
        [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    )
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr("x.npy", npy_bytes(array, version))
        archive.writestr("y.npy", npy_bytes(np.arange(20), version))
    return ".npz", stream.getvalue()


def test_a_mutated_array_file_gives_one_clear_error_or_finite_data(tmp_path, cases):
    draw = random.Random(0)
    for number in range(cases):
        suffix, content = array_files(draw)
        content = bytearray(content)
        # Half of the mutations where the structure is: at the head of an .npy, at the end of an .npz.
        if draw.randrange(2):
            size = min(len(content), 128 if suffix == ".npy" else 300)
            part = slice(0, size) if suffix == ".npy" else slice(len(content) - size, None)
            piece = bytearray(content[part])
            draw.choice(BYTES)(piece, draw)
            content[part] = piece
        else:
            draw.choice(BYTES)(content, draw)
        path = tmp_path / f"mutated{suffix}"
        path.write_bytes(content)
        try:
            data = pv.datasets.load(path, binarize="none")
        except pv.InputError as error:
            problem = "" if "\n" not in str(error) and len(str(error)) < 1000 else str(error)
        else:
            fine = all(part.isfinite().all() for part in (data.train, data.test))
            problem = "" if fine else "data that are not finite"
        assert not problem, f"case {number}: {problem}"


def test_a_mutated_idx_file_gives_one_clear_error_or_images(tmp_path, cases):
    draw = random.Random(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    files = {}
    for part in ("train", "t10k"):
        images = struct.pack(">HBB3I", 0, 8, 3, 10, 28, 28) + draw.randbytes(10 * 28 * 28)
        labels = struct.pack(">HBBI", 0, 8, 1, 10) + bytes(range(10))
        files |= {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}
    for number in range(cases):
        name = draw.choice(list(files))
        content = bytearray(files[name])
        header = content[:16]
        if draw.randrange(2):
            draw.choice(BYTES)(header, draw)
            content[:16] = header
        else:
            draw.choice(BYTES)(content, draw)
        for other, whole in files.items():
            (raw / other).write_bytes(content if other == name else whole)
        try:
            data = pv.datasets.load("mnist", tmp_path)
        except pv.InputError as error:
            problem = "" if "\n" not in str(error) and len(str(error)) < 1000 else str(error)
        else:
            problem = "" if data.data_shape == (1, 28, 28) else f"shape {data.data_shape}"
        assert not problem, f"case {number}, {name}: {problem}"


# --- what commands read: a finished sweep of one run, its checkpoints, what a comparison measured ---


class Files:
    """The files that commands read, and how each is read; what is read must be what was written."""

    def __init__(self, folder):
        self.x = torch.bernoulli(torch.rand(12, 6))
        np.save(folder / "bits.npy", self.x.numpy())
        options = ("--hidden", 3, "--latent-dim", 2, "--device", "cpu", "--epochs", 1)
        data = ("--dataset", folder / "bits.npy", "--batch-size", 8)
        made = (
            ("sweep", *options, *data, "--betas", "1", "--output", folder / "swept"),
            ("train", *options, *data, "--output", folder / "run"),
            ("compare", *options, *data, "--guides", "mean-field", "--seeds", 1, "--num-samples", 30,
             "--output", folder / "compared"),
        )  # fmt: skip
        with sketching():
            for command in made:
                result = run(*command)
                assert result.code == 0, result.err
        self.kept = folder / "kept"
        self.fit(make_small())
        self.swept, self.run = folder / "swept", folder / "run"
        self.asked = json.loads((self.swept / "study.json").read_text())["asked"]
        (self.compared,) = (folder / "compared" / "runs").iterdir()

    def fit(self, vae, **options):
        pv.fit(vae.model, vae.guide, self.x, epochs=2, seed=0, checkpoint=self.kept, **options)
        return vae

    def read_run(self):
        vae, settings, limits = open_run(self.run, torch.device("cpu"))
        record, _ = read_run(self.run)
        # A run may know less of itself, as an earlier version's does.
        return vae, (settings, limits, record.get("checksums"), record.get("processes"))

    def read_metrics(self):
        folder = study.Study(self.swept, None, torch.device("cpu"))
        vae, metrics = folder.run("beta-1", None)
        return vae, sweep._row(1.0, metrics)

    def read_study(self):
        return pv.load(self.run), study._check_folder(self.swept, self.asked)

    def read_checkpoint(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the checkpoint .* can't be read")
            return self.fit(make_small(), resume=True), None

    def read_measured(self):
        load_measured(self.compared)
        return pv.load(self.run), None  # numbers carry no checksum: that they are read is all

    def all(self):
        checkpoint = max(self.kept.iterdir())
        return {
            "config.json": (self.run / "config.json", self.read_run, [mutate_bytes, mutate_settings]),
            "metrics.json": (
                self.swept / "runs" / "beta-1" / "metrics.json",
                self.read_metrics,
                [mutate_bytes, mutate_settings],
            ),
            "study.json": (
                self.swept / "study.json",
                self.read_study,
                [mutate_bytes, mutate_settings],
            ),
            "checkpoint": (checkpoint, self.read_checkpoint, [mutate_bytes, mutate_header]),
            "measured": (
                self.compared / "measured.safetensors",
                self.read_measured,
                [mutate_bytes, mutate_header],
            ),
        }


def make_small():
    torch.manual_seed(0)
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (3,)), (6,)),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((6,), (3,)), 2),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with pyro.get_param_store().scope():
        return Files(tmp_path_factory.mktemp("read"))


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.json", "study.json", "checkpoint", "measured"]
)
def test_a_mutated_file_of_a_command_gives_one_clear_error_or_the_same(files, request, name, capsys):
    path, read, mutations = files.all()[name]
    content, original = path.read_bytes(), read()
    draw = random.Random(0)
    refused, number = 0, request.config.getoption("--cases") or CASES // 5
    for case in range(number):
        mutate = draw.choice(mutations)
        mutate(path, draw)
        try:
            found = read()
        except pv.InputError as error:
            refused += 1
            problem = "" if 10 < len(str(error)) < 1000 else str(error)
        else:
            same = is_equal(found[0], original[0])
            problem = "" if same else "another model"
        finally:
            path.write_bytes(content)
        assert not problem, f"case {case}, {mutate.__name__} of {name}: {problem}"
    print(f"{name}: {refused} of {number} refused")
    assert refused > 0.2 * number
