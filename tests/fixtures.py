"""Locates and loads the files of tests/fixtures, made by the published systems."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def fixture_tensors(name: str) -> dict[str, Tensor]:
    """Tensors of one safetensors file, such as "disc2d/io"."""
    return load_file(FIXTURES / f"{name}.safetensors")


def fixture_json(name: str) -> Any:
    """Content of one JSON file, such as "disc2d/config"."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def fixture_rows(name: str) -> list[dict[str, str]]:
    """Rows of one CSV file, such as "lr_schedules"."""
    with (FIXTURES / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def loss_cases(version: str) -> Iterator[dict[str, Any]]:
    """Cases of one loss fixture that need no wavelet loss."""
    for case in fixture_json(f"losses/{version}")["cases"]:
        if not case.get("wavelet"):
            yield case
