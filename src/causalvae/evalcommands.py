"""The commands `eval` and `compare` as the command line calls them: settings taken apart into arguments."""

from collections.abc import Sequence
from pathlib import Path

from causalvae.compare import Comparison, compare, read_measured
from causalvae.errors import ConfigError
from causalvae.evalflags import CompareSettings, EvalSettings, FailRule
from causalvae.evaluate import Asked, Evaluated, Work, evaluate
from causalvae.subjects import Judges, Reading


def run_eval(settings: EvalSettings) -> Evaluated:
    """Evaluate what was asked for."""
    judges = Judges(
        perceptual=settings.perceptual,
        i3d=None if settings.i3d is None else Path(settings.i3d),
        framing=settings.framing,
        probes=settings.probes,
        cost=settings.cost,
    )
    how = Reading(
        prefer=settings.weights,
        model_config=None if settings.model_config is None else Path(settings.model_config),
        precision=settings.precision,
        device=settings.device,
    )
    return _evaluate(settings.checkpoint, settings, judges=judges, how=how, films=settings.films)


def run_compare(words: Sequence[str], settings: CompareSettings) -> Comparison:
    """Compare the two that were named, after evaluating them where videos are given."""
    if len(words) != 2:
        raise ConfigError("causalvae compare: name two checkpoints, runs or files of `causalvae eval`")
    files = [Path(word) for word in words]
    if settings.video_path is not None or settings.manifest is not None:
        how = Reading(prefer=settings.weights, device=settings.device)
        files = list(_evaluate(words, settings, judges=Judges(), how=how, films=0).files)
    if len(files) != 2 or files[0] == files[1]:
        raise ConfigError(f"causalvae compare: {words[0]} and {words[1]} are one and the same")
    first, second = (read_measured(file, side=settings.weights) for file in files)
    return compare(first, second, rules=[FailRule.parse(text) for text in settings.fail_if or ()])


def _evaluate(
    checkpoints: Sequence[str],
    settings: EvalSettings | CompareSettings,
    *,
    judges: Judges,
    how: Reading,
    films: int,
) -> Evaluated:
    size = settings.resolution
    work = Work(batch_size=settings.batch_size, workers=settings.dataloader_num_workers, films=films)
    return evaluate(
        checkpoints,
        out=Path(settings.out),
        video_path=settings.video_path,
        manifest=None if settings.manifest is None else Path(settings.manifest),
        asked=Asked(
            frames=settings.num_frames,
            size=None if size is None else (size.height, size.width),
            stride=settings.sample_rate,
            per_video=settings.clips_per_video,
        ),
        judges=judges,
        work=work,
        how=how,
    )
