"""Every example in a docstring runs as written."""

import doctest
import importlib
import pkgutil

import pytest

import pyro_vae

MODULES = [
    module.name
    for module in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae.")
    if not module.name.endswith("__main__")
]


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(bool(test.examples) for m in modules for test in finder.find(m)) > 15


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
