"""What holds for every test: what is kept between runs goes to a folder of the tests' own."""

import os
import shutil
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    os.environ["CAUSALVAE_HOME"] = tempfile.mkdtemp(prefix="causalvae-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["CAUSALVAE_HOME"], ignore_errors=True)
