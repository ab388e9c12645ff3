"""The commands of the program: what runs each, its table of flags, and what its help page says.

Each imports its stage when it is called, so that `--help` takes no longer than it takes to read.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from causalvae.config import DemoSettings, NoSettings, TrainSettings, read_settings
from causalvae.doctorflags import DoctorSettings
from causalvae.evalflags import CompareSettings, EvalSettings
from causalvae.explainflags import ExplainSettings
from causalvae.flags import printable
from causalvae.flagtext import MAX_WIDTH, default_texts
from causalvae.foreignflags import translate
from causalvae.latentflags import DecodeSettings, EncodeSettings, with_first
from causalvae.models.presets import presets_table
from causalvae.reconstructflags import ReconstructSettings
from causalvae.reportflags import ReportSettings, WatchSettings, cut_at_command, paths_of, split_words
from causalvae.scanflags import ScanSettings, scan_paths
from causalvae.weightflags import ConvertSettings, ExportSettings, InitSettings, with_places

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Command:
    """One command: what runs it, its table of settings, what it does in a line, and what to know about it."""

    call: Callable[[Sequence[str]], int]
    table: "type[DataclassInstance]"
    does: str
    more: str
    words: str = ""  # what stands before the flags, for the help page


def show(text: str) -> int:
    """Print a text; the exit status of a command that has done its work."""
    print(text, end="")
    return 0


def _wait_without_spinning() -> None:
    """Before torch is imported: its threads sleep while they wait for each other.

    They spin by default, and where another process wants a core too, a step takes up to four times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _train(argv: Sequence[str]) -> int:
    ours, notes = translate(argv)
    settings, given = read_settings(TrainSettings, ours)
    _wait_without_spinning()
    from causalvae.train.trainer import train

    return train(settings, given=given, command=("causalvae", "train", *argv), notes=notes).status


def _demo(argv: Sequence[str]) -> int:
    settings, _ = read_settings(DemoSettings, argv)
    _wait_without_spinning()
    from causalvae.demo import demo

    result = demo(output_dir=Path(settings.output_dir), seed=settings.seed, max_steps=settings.max_steps)
    show(result.text)
    return result.status


def _eval(argv: Sequence[str]) -> int:
    settings, _ = read_settings(EvalSettings, argv)
    _wait_without_spinning()
    from causalvae.evalcommands import run_eval

    return show(run_eval(settings).text)


def _compare(argv: Sequence[str]) -> int:
    words, flags = split_words(argv)
    settings, _ = read_settings(CompareSettings, flags)
    _wait_without_spinning()
    from causalvae.evalcommands import run_compare

    done = run_compare(words, settings)
    show(done.text)
    return done.status


def _reconstruct(argv: Sequence[str]) -> int:
    words, flags = split_words(argv, table=ReconstructSettings)
    settings, _ = read_settings(ReconstructSettings, flags)
    _wait_without_spinning()
    os.environ.setdefault("SVT_LOG", "1")  # errors alone: its encoder tells the terminal about itself
    from causalvae.reconstruct import run_reconstruct

    done = run_reconstruct(words, settings, say=lambda text: print(text, end="", flush=True))
    show(done.text)
    return done.status


def _encode(argv: Sequence[str]) -> int:
    settings, _ = read_settings(EncodeSettings, with_first(argv, "video_path"))
    _wait_without_spinning()
    from causalvae.latentcommands import run_encode

    return show(run_encode(settings))


def _decode(argv: Sequence[str]) -> int:
    settings, _ = read_settings(DecodeSettings, with_first(argv, "latents"))
    _wait_without_spinning()
    os.environ.setdefault("SVT_LOG", "1")  # as above
    from causalvae.latentcommands import run_decode

    return show(run_decode(settings))


def _report(argv: Sequence[str]) -> int:
    words, flags = split_words(argv)
    settings, _ = read_settings(ReportSettings, flags)
    paths, out = paths_of(words, command="report"), Path(settings.out)
    from causalvae.report.build import write_report

    report = write_report(paths, out=out, defaults=default_texts(TrainSettings), lang=settings.lang)
    notes = "".join(f"warning: {note}\n" for note in report.notes)
    size = f"{len(report.page) / 1e6:.1f} MB"
    return show(f"{notes}{printable(str(out))}: {report.runs} runs, {report.clips} clips, {size}\n")


def _watch(argv: Sequence[str]) -> int:
    words, flags = split_words(argv)
    settings, _ = read_settings(WatchSettings, flags)
    paths = paths_of(words, command="watch")
    from causalvae.report.watch import watch

    return watch(
        paths,
        defaults=default_texts(TrainSettings),
        lang=settings.lang,
        every=settings.every,
        port=settings.port,
        say=lambda text: print(text, end="", flush=True),
    )


def _explain(argv: Sequence[str]) -> int:
    own, command = cut_at_command(argv)
    words, flags = split_words(own, table=ExplainSettings)
    settings, _ = read_settings(ExplainSettings, flags)
    from causalvae.commandlines import find_command

    asked = find_command(words, command, os.environ)
    _wait_without_spinning()
    from causalvae.explain import as_json, as_text, explain
    from causalvae.texts import language

    explanation = explain(asked, measure=settings.measure)
    lang = language(settings.lang, os.environ)
    if settings.json:
        return show(as_json(explanation, lang))
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    return show(as_text(explanation, lang, width=width, everything=settings.all))


def _data(argv: Sequence[str]) -> int:
    own, command = cut_at_command(argv)
    words, flags = split_words(own, table=ScanSettings)
    settings, _ = read_settings(ScanSettings, flags)
    paths = scan_paths(words)
    _wait_without_spinning()
    from causalvae.scancommand import run_scan

    return show(run_scan(paths, settings, command=command))


def _doctor(argv: Sequence[str]) -> int:
    own, command = cut_at_command(argv)
    settings, _ = read_settings(DoctorSettings, own)
    _wait_without_spinning()
    from causalvae.doctorcommand import run_doctor

    done = run_doctor(settings, command=command)
    show(done.text)
    return done.status


def _models(argv: Sequence[str]) -> int:
    read_settings(NoSettings, argv)
    return show(presets_table())


def _init(argv: Sequence[str]) -> int:
    settings, _ = read_settings(InitSettings, argv)
    from causalvae.initialise import initialise

    source = None if settings.from_ is None else Path(settings.from_)
    text = initialise(
        source,
        Path(settings.out),
        model=settings.model,
        method=settings.method,
        seed=settings.seed,
        overwrite=settings.overwrite,
    )
    return show(text)


def _convert(argv: Sequence[str]) -> int:
    settings, _ = read_settings(ConvertSettings, with_places(argv))
    from causalvae.export import run_convert

    return show(run_convert(settings))


def _export(argv: Sequence[str]) -> int:
    settings, _ = read_settings(ExportSettings, with_places(argv))
    from causalvae.programs import export

    done = export(
        Path(settings.source),
        Path(settings.out),
        to=settings.to,
        prefer=settings.weights,
        model_config=None if settings.model_config is None else Path(settings.model_config),
        overwrite=settings.overwrite,
    )
    return show(done.text)


COMMANDS = {
    "train": Command(
        _train,
        TrainSettings,
        "Train a causal video VAE on videos",
        "Give the same command again after any interruption and it goes on from its last checkpoint. To "
        "begin with, set --video_path, --batch_size and --max_steps.",
    ),
    "demo": Command(
        _demo,
        DemoSettings,
        "Train a tiny model on the clips that come with the package",
        "It evaluates the model on a clip that it never saw and writes the report: the whole job in about "
        "two minutes on two CPU cores.",
    ),
    "explain": Command(
        _explain,
        ExplainSettings,
        "Take a training command apart, flag by flag, in plain words",
        "Give the command behind --, or a FILE: a shell script, a YAML file of settings, or the folder of a "
        "run. It tells what each flag means, what the command will do on this machine and what looks wrong, "
        "in English or Chinese. It starts nothing.",
        "[FILE] ",
    ),
    "eval": Command(
        _eval,
        EvalSettings,
        "Measure checkpoints on a set of videos",
        "It writes which clips were measured, manifest.json, so that the same numbers come out elsewhere, "
        "and a JSON file for each checkpoint. Give the same command again after an interruption: it goes on.",
    ),
    "compare": Command(
        _compare,
        CompareSettings,
        "Tell what changed between two evaluations, clip by clip",
        "A and B are files of `causalvae eval`, or runs whose newest evaluations are compared; or, with "
        "--video_path or --manifest, checkpoints to evaluate first. With --fail_if it is a test for CI.",
        "A B ",
    ),
    "reconstruct": Command(
        _reconstruct,
        ReconstructSettings,
        "Send videos and pictures through a model and back",
        "IN is a video, a picture, a folder of them, or a list, of any length and size. Beside every result "
        "is NAME.json, with PSNR, SSIM and how it was made. Give the same command again after an "
        "interruption: it goes on.",
        "IN... ",
    ),
    "encode": Command(
        _encode,
        EncodeSettings,
        "Encode videos to latents, for the training of other models",
        "It writes tar files or folders of safetensors, an index, and statistics of the channels. Give the "
        "same command again after an interruption: it goes on, and what comes out is bitwise the same.",
        "VIDEOS ",
    ),
    "decode": Command(
        _decode,
        DecodeSettings,
        "Decode latents to videos and pictures",
        "LATENTS is the folder of `causalvae encode`, or one of its files. Videos are named by the key of "
        "their latent; decoded.jsonl says which is which.",
        "LATENTS ",
    ),
    "init": Command(
        _init,
        InitSettings,
        "Make a first checkpoint, from an image VAE or from a seed",
        "An image VAE becomes a video VAE that does to pictures what the image VAE does. Training goes on "
        "from there: give the file that is written to `causalvae train --load_from_checkpoint`.",
    ),
    "convert": Command(
        _convert,
        ConvertSettings,
        "Write weights of one format as another",
        "`causalvae convert IN OUT` reads what --load_from_checkpoint reads, and writes torch, safetensors, "
        "MindSpore, or a folder of diffusers or Open-Sora-Plan. Nothing is lost: the way back gives the same "
        "weights, bit for bit.",
        "IN OUT ",
    ),
    "export": Command(
        _export,
        ExportSettings,
        "Write encoder and decoder as programs",
        "`causalvae export IN OUT --to onnx` writes a folder: encoder.onnx, decoder.onnx, program.json. "
        "The programs take any batch, frames and size, and are compared with the model before they get their "
        "names. Formats of weights: `causalvae convert`.",
        "IN OUT ",
    ),
    "report": Command(
        _report,
        ReportSettings,
        "Write one HTML page about one or more runs",
        "RUN is the folder of a run, or a JSON file of `causalvae eval`. The page needs no network and no "
        "other file.",
        "RUN... ",
    ),
    "watch": Command(
        _watch,
        WatchSettings,
        "Show that page in a browser while a training goes on",
        "RUN is the folder of a run. Only this machine can open the page, by the address that is printed.",
        "RUN... ",
    ),
    "doctor": Command(
        _doctor,
        DoctorSettings,
        "Tell what this machine can do, and what would help",
        "It looks at devices, memory, compiler, disk, codecs and what is installed, and changes nothing. A "
        "training command may follow --: would it fit, how would it be planned, and how fast would it be? "
        "The exit status is 1 if there is a problem.",
    ),
    "data": Command(
        _data,
        ScanSettings,
        "Read a dataset once and tell what it holds",
        "It counts videos and finds those that are broken or there twice. What it reads is kept, so that "
        "training and the next scan start at once. PATH is what --video_path of training takes. A training "
        "command may follow --, to see what it would draw.",
        "scan PATH ",
    ),
    "models": Command(
        _models,
        NoSettings,
        "List the presets of --model",
        "It tells by how much they downsample a clip, the channels of their latents, their norms and "
        "resampling, and the channels at each level.",
    ),
}
