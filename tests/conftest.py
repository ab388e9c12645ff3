"""What holds for every test: what is kept between runs goes to a folder of the tests' own, and Ctrl-C ends.

A shell that starts something in the background has it and its children ignore SIGINT.
"""

import os
import shutil
import signal
import tempfile
import threading

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    os.environ["CAUSALVAE_HOME"] = tempfile.mkdtemp(prefix="causalvae-tests-")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["CAUSALVAE_HOME"], ignore_errors=True)
