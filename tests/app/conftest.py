"""What the tests of the command line find: a finished run on the digits, and data files."""

import shutil

import numpy as np
import pytest
from command_line import sketching, train


@pytest.fixture
def rendered():
    """Asked for by a test whose pictures are rendered."""


@pytest.fixture(autouse=True)
def _sketched(request):
    if "rendered" in request.fixturenames:
        yield
    else:
        with sketching():
            yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A finished run on the digits; tests only read it."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train("--output", folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Data files, good and bad."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    vectors = random.normal(5, 2, (100, 3))
    arrays = {
        "vectors": vectors,
        "plane": vectors[:, :2],
        "scalars": vectors[:, :1],
        "bits": random.integers(0, 2, (100, 6)),
        "grey": random.random((100, 1, 5, 4)),
        "colour": random.random((60, 4, 5, 3)),
        "bytes": random.integers(0, 256, (100, 8, 8)).astype(np.uint8),
        "negative": -random.random((100, 8)),
        "nan": np.where(vectors > 8, np.nan, vectors),
        "inf": np.where(vectors > 8, np.inf, vectors),
        "empty": vectors[:0],
        "flat": vectors[:, 0],
        "single": vectors[:1],
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    (folder / "text.npy").write_text("1,2,3\n")
    return folder


@pytest.fixture
def here(tmp_path, files, digits, monkeypatch):
    """An own working folder with the data files and a finished run called ``run``."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    shutil.copytree(digits, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path
