"""The commands that look into a trained run: pictures of every kind of run, and every mistake."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import WARNED, run, sketching

from pyro_vae import InputError
from pyro_vae.app.pictures import hide_part

pytestmark = WARNED


RUNS = {
    "plain": "--latent-dim 2",
    "single": "--latent-dim 1",
    "vamp": "--latent-dim 3 --prior vamp --num-components 5 --guide full-rank",
    "sphere": "--latent-dim 3 --prior hypersphere-uniform --guide von-mises-fisher",
    "circle": "--latent-dim 2 --prior von-mises-fisher --guide von-mises-fisher",
    "beta": "--latent-dim 3 --prior beta --guide beta",
    "flow": "--latent-dim 2 --prior flow --guide iaf",
    "vectors": "--latent-dim 2 --dataset vectors.npz --likelihood gaussian",
    "many": "--latent-dim 2 --dataset many.npy --likelihood gaussian",
}
COMMANDS = {
    "latent": "latent",
    "pca": "latent --plane pca",
    "manifold": "latent --view manifold --num-steps 4",
    "traverse": "traverse --num 2 --num-steps 3",
    "interpolate": "interpolate --num 2 --num-steps 3",
    "metropolis": "complete --num 3 --num-draws 2 --num-steps 4",
    "importance": "complete --num 3 --num-draws 2 --method importance --missing random:0.3",
}
REPEATED = ("latent", "traverse", "interpolate", "metropolis")  # of "plain", and by its seed
# One run of each kind of picture is looked at in every test run, the others with the slow tests.
QUICK = {
    *(("plain", command) for command in COMMANDS.keys() - REPEATED),
    *(("vectors", command) for command in ("manifold", "traverse", "importance")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trained runs by name, made when they are first asked for; tests only read them."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    vectors = random.normal(size=(120, 4))
    np.savez(folder / "vectors.npz", x=vectors, y=np.arange(120) % 3)
    np.save(folder / "many.npy", random.normal(size=(120, 12)))

    def get(name):
        if not (folder / name).exists():
            small = ("--hidden", "16", "--epochs", "1", "--device", "cpu", "--output", folder / name)
            with contextlib.chdir(folder), sketching():
                result = run("train", *small, *RUNS[name].split())
            assert result.code == 0, result.err
        return folder / name

    return get


@pytest.mark.parametrize(
    ("name", "command"),
    [
        pytest.param(name, command, marks=() if (name, command) in QUICK else pytest.mark.slow)
        for name in RUNS
        for command in COMMANDS
    ],
)
def test_every_picture_of_every_run(runs, tmp_path, rendered, name, command):
    picture = tmp_path / "picture.png"
    first, *options = COMMANDS[command].split()
    result = run(first, runs(name), *options, "--output", picture)
    assert result.code == 0, result.err
    assert result.err == ""
    assert result.out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", REPEATED)
def test_pictures_lie_in_the_run_and_are_repeated_by_the_seed(runs, tmp_path, rendered, command):
    folder = runs("plain")
    command, *options = [*COMMANDS[command].split(), "--seed", 3]
    result = run(command, folder, *options)
    assert (result.code, result.err) == (0, "")
    path = Path(result.out.strip())
    assert path.parent == folder
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert run(command, folder, *options).out.strip() == str(path)
    assert path.read_bytes() == content
    path.unlink()
    picture = tmp_path / "new" / "picture.svg"
    assert run(command, folder, *options, "--output", picture).code == 0
    assert b"<svg" in picture.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("latent --view scater", "did you mean 'scatter'?"),
        ("latent --plane pcb", "did you mean 'pca'?"),
        ("latent --num 0", "--num of at least 1, got 0"),
        ("latent --view manifold --num-steps 1", "expected --num-steps from 2 to 200, got 1"),
        ("latent --seed -1", "--seed of at least 0"),
        ("latent --output x.txt", ".png, .svg or .pdf"),
        ("traverse --datum 0", "--datum of at least 1, got 0"),
        ("traverse --datum 360", "test datum from 1 to 359, got 360"),
        ("traverse --num 0", "--num of at least 1"),
        ("interpolate --num-steps 1000", "--num-steps from 2 to 200, got 1000"),
        ("complete --method metropolist", "did you mean 'metropolis'?"),
        ("complete --missing bottom", "upper, lower or random:SHARE, got 'bottom'"),
        ("complete --missing random:1.5", "share between 0 and 1 after random:, got '1.5'"),
        ("complete --missing random", "share between 0 and 1 after random:, got ''"),
        ("complete --num-draws 0", "expected --num-draws of at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(runs, arguments, message):
    folder = runs("plain")
    before = sorted(folder.iterdir())
    command, *options = arguments.split()
    result = run(command, folder, *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_halves_of_images_and_vectors():
    image = torch.arange(2 * 5 * 4).view(2, 5, 4).expand(3, 2, 5, 4)[:, :1]
    upper = hide_part("upper", (1, 5, 4), 3, seed=0)
    lower = hide_part("lower", (1, 5, 4), 3, seed=0)
    assert upper.shape == image.shape
    assert upper[:, :, :3].all()
    assert not upper[:, :, 3:].any()
    assert lower[:, :, 2:].all()
    assert not lower[:, :, :2].any()
    left = hide_part("left", (5, 4, 3), 2, seed=0)
    assert left[:, :, :2].all()
    assert not left[:, :, 2:].any()
    assert hide_part("right", (6,), 1, seed=0).tolist() == [[False] * 3 + [True] * 3]
    with pytest.raises(InputError, match="left, right or random:SHARE, got 'lower'"):
        hide_part("lower", (6,), 1, seed=0)


def test_a_random_part_has_its_share_and_hides_all_channels_of_a_pixel():
    hidden = hide_part("random:0.3", (3, 20, 20), 50, seed=1)
    assert hidden.shape == (50, 3, 20, 20)
    assert (hidden[:, 0] == hidden[:, 1]).all()
    count = 50 * 400
    assert abs(hidden[:, 0].double().mean().item() - 0.3) < 5 * (0.21 / count) ** 0.5
    assert not (hidden[0] == hidden[1]).all()
    assert hide_part("random:0.3", (3, 20, 20), 50, seed=1).equal(hidden)
