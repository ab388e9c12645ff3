"""From clips and their reconstructions to records, and from records to what is said of a set.

A record is the JSON of one clip. The evaluation of a checkpoint and that of a training share all of this.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from causalvae.artefacts import seam_of_steps, step_errors
from causalvae.fidelity import mean_curve, psnr_by_frame, psnr_of_mse
from causalvae.geometry import Geometry
from causalvae.metrics import Metric, bootstrap, grid_metrics, mean, measured

FORMAT = "causalvae eval 1"
Json = Mapping[str, Any]  # Any: JSON values nest
SEED = 0  # of the bootstrap: the same clips have the same interval


def model_metrics(geometry: Geometry) -> dict[str, Metric]:
    """Metrics of the traces that a model of this geometry can leave: grid and seams of latent frames."""
    borders = range(1, 1 << 16, geometry.temporal)  # where the frames of one latent frame end

    def seams(clip: Tensor, recon: Tensor) -> float | None:
        seam = seam_of_steps(step_errors(clip, recon, axis="time"), borders=borders)
        return None if seam is None else seam.decibels

    found = grid_metrics(geometry.spatial) if geometry.spatial > 1 else {}
    if geometry.temporal > 1:
        found["latent_seams"] = Metric(
            name="latent_seams", unit="dB", better="lower", source="definition", measure=seams,
            definition="error of the steps in time across borders of latent frames over that of other steps",
        )  # fmt: skip
    return found


def score(clip: Tensor, recon: Tensor, *, metrics: Mapping[str, Metric]) -> dict[str, Any]:  # Any: JSON
    """The numbers of one clip. clip, recon: uint8 3 t h w."""
    film, seen = clip.permute(1, 2, 3, 0), recon.permute(1, 2, 3, 0)  # 3 t h w -> t h w 3
    numbers = measured(film, seen, metrics=dict(metrics))
    return {"metrics": numbers, "psnr_by_frame": psnr_by_frame(film, seen)}


def summary(records: Sequence[Json], *, metrics: Mapping[str, Metric]) -> dict[str, Any]:  # Any: JSON
    """Means over clips with 95 % intervals, by metric, and curves. The order of the records has no effect."""
    found: dict[str, Any] = {}  # Any: as above
    for name, metric in metrics.items():
        values = [record["metrics"][name] for record in records if name in record["metrics"]]
        if values:
            found[name] = {
                "mean": mean(values),
                **interval(values),
                "clips": len(values),
                "unit": metric.unit,
                "better": metric.better,
            }
    if "mse" in found:
        found["psnr_pooled"] = _pooled(found["mse"])
    curve = mean_curve(sorted(record["psnr_by_frame"] for record in records))
    frames = {"x": list(range(len(curve))), "y": curve, "unit": "dB", "x_label": "frame"}
    return {"metrics": found, "curves": {"psnr_by_frame": frames}}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Bounds of the mean, `low` and `high`; nothing for a single value."""
    bounds = bootstrap(values, seed=SEED)
    return {} if bounds is None else {"low": bounds[0], "high": bounds[1]}


def _pooled(errors: Json) -> dict[str, Any]:  # Any: JSON
    """PSNR of the mean squared error: clips of one size have equal shares. A small error is a high PSNR."""
    turned = {"mean": "mean", "low": "high", "high": "low"}
    values = {name: psnr_of_mse(errors[of]) for name, of in turned.items() if of in errors}
    return {**values, "clips": errors["clips"], "unit": "dB", "better": "higher"}
