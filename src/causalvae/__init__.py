"""Causal video VAEs: train, evaluate, stream and exchange them. Names load when they are first used."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalvae.codec import load
    from causalvae.config import TrainSettings
    from causalvae.evaluate import evaluate
    from causalvae.flags import Resolution
    from causalvae.latentdata import latents
    from causalvae.models.base import VideoVAE
    from causalvae.train.trainer import train

__version__ = "0.1.0"
__all__ = [
    "Resolution", "TrainSettings", "VideoVAE", "__version__", "evaluate", "latents", "load", "train",
]  # fmt: skip

_HOMES = {
    "Resolution": "causalvae.flags",
    "TrainSettings": "causalvae.config",
    "VideoVAE": "causalvae.models.base",
    "evaluate": "causalvae.evaluate",
    "latents": "causalvae.latentdata",
    "load": "causalvae.codec",
    "train": "causalvae.train.trainer",
}


def __getattr__(name: str) -> Any:  # Any: each public name has a type of its own
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'causalvae' has no attribute {name!r}")
    return getattr(import_module(home), name)


class _Package(ModuleType):
    """This package. `causalvae.train` stays the function, though importing the folder sets that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
