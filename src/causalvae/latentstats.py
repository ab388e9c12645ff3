"""Statistics of a set of latents, by which diffusion models bring them to mean 0 and deviation 1.

Per channel, and over all of them as in latent diffusion (Rombach et al. 2022, appendix G: the scaling factor
is one over the deviation of all numbers). Of the numbers that are stored; where a variance is stored with
each mean, of samples.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalvae.errors import ConfigError
from causalvae.flags import printable
from causalvae.moments import ChannelMoments

FORMAT = "causalvae latent statistics 1"
OF = {"mean": "means", "moments": "samples", "sample": "samples"}  # what is stored -> what numbers these are
Json = Mapping[str, Any]  # Any: JSON values nest


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of a stats.json. mean, deviation: of each channel. scaling_factor: one for all.

    model: which weights made the latents.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    scaling_factor: float
    model: Json


def statistics(moments: ChannelMoments, *, samples: int, of: str, model: Json) -> dict[str, Any]:  # Any: JSON
    """The content of stats.json. moments: of all numbers; without any, there are no numbers in it."""
    facts: dict[str, Any] = {"format": FORMAT, "of": OF[of], "model": dict(model), "samples": samples}
    facts["numbers_per_channel"] = moments.count
    if moments.count == 0:
        return facts
    overall = moments.pooled()
    deviation = moments.deviation().tolist()
    return facts | {
        "mean": moments.mean.tolist(),
        "deviation": deviation,
        "scaling_factors": [1.0 / each if each > 0.0 else None for each in deviation],
        "overall_mean": overall.mean.item(),
        "overall_deviation": overall.deviation().item(),
        **({"scaling_factor": 1.0 / overall.deviation().item()} if overall.squares.item() > 0.0 else {}),
    }


def count_samples(path: Path) -> int:
    """How many latents a stats.json is of. OSError if there is none, ConfigError if it is none."""
    return int(_parsed(path)["samples"])


def read_statistics(path: Path) -> Statistics:
    """What a stats.json says. ConfigError if it is none, or if a channel is the same everywhere."""
    named = printable(str(path))
    try:
        found = _parsed(path)
        mean, deviation = (tuple(float(each) for each in found[name]) for name in ("mean", "deviation"))
        model = dict(found["model"])
        scaling_factor = float(found["scaling_factor"])
    except OSError as error:
        raise ConfigError(f"{named}: can't be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{named}: damaged, or of no latents: {error!r}") from error
    sound = len(mean) == len(deviation) > 0 and all(map(math.isfinite, (*mean, *deviation, scaling_factor)))
    if not sound or min(deviation) <= 0.0:
        constant = [i for i, each in enumerate(deviation) if each <= 0.0]
        what = f"channel {constant[0]} has the same number everywhere" if constant else "damaged"
        raise ConfigError(f"{named}: {what}, so latents can't be brought to deviation 1 by it")
    return Statistics(mean=mean, deviation=deviation, scaling_factor=scaling_factor, model=model)


def _parsed(path: Path) -> Json:
    """The content of a stats.json. ConfigError if the file is another one."""
    data = path.read_bytes()
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{printable(str(path))}: not JSON") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or type(found.get("samples")) is not int:
        raise ConfigError(f"{printable(str(path))}: not the stats.json of `causalvae encode`")
    return found
