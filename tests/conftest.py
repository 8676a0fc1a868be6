"""Every test starts from the same seed."""

import random

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def rng():
    """A generator for the test; Python's own starts from the same seed."""
    random.seed(0)
    return np.random.default_rng(0)
