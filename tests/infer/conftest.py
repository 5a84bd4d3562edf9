"""Data for the tests of training and of the compiled step."""

import pytest
import torch


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(7, 6, generator=generator).bernoulli(generator=generator)
