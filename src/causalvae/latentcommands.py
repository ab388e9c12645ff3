"""The commands `encode` and `decode` as the command line calls them: settings taken apart into arguments."""

import hashlib
import json
import os
from pathlib import Path

import torch

from causalvae import __version__
from causalvae.data.sources import ClipSource, open_source
from causalvae.decoding import Wish, decode_latents
from causalvae.encoding import Encoded, Maker, Recipe, Share, encode_videos
from causalvae.errors import ConfigError
from causalvae.evaluate import SHOWN_LEFT_OUT
from causalvae.evalwork import in_words
from causalvae.files import refuse_place
from causalvae.flags import flags_of, printable
from causalvae.footage import Cut
from causalvae.infer import Opened, open_vae, plain_arithmetic
from causalvae.latentfiles import Record
from causalvae.latentflags import DecodeSettings, EncodeSettings, ranked, shard_of
from causalvae.latentset import FORMAT
from causalvae.locks import held
from causalvae.machine import available_bytes, pick_device
from causalvae.models.diffusers import DiffusersVAE
from causalvae.reconstructflags import memory_wish, tile_wish


def run_encode(settings: EncodeSettings) -> str:
    """Encode what was asked for; what to say of it."""
    flags = flags_of(settings)
    source = open_source(settings.video_path, caption_column=settings.caption_column)
    opened = _opened(settings)
    if settings.store == "moments" and isinstance(opened.vae, DiffusersVAE) and opened.vae.certain:
        raise ConfigError("--store moments: this model has no variance; give --store mean")
    size = settings.resolution
    budget = memory_wish(flags["memory"], settings.memory)
    recipe = Recipe(
        cut=Cut(
            frames=settings.num_frames,
            size=None if size is None else (size.height, size.width),
            stride=settings.sample_rate,
            per_video=settings.clips_per_video,
            batch=settings.batch_size,
        ),
        store=settings.store,
        dtype=settings.dtype,
        seed=settings.seed,
        column=settings.caption_column,
        tile=tile_wish(flags["tile"], settings.tile),
        budget=available_bytes(str(opened.device)) if budget is None else budget,
    )
    number, count = ranked(shard_of(flags["shard"], settings.shard), os.environ)
    facts = _facts(settings, source, opened=opened, recipe=recipe)
    with plain_arithmetic():
        done = encode_videos(
            source,
            Path(settings.out),
            facts=facts,
            maker=Maker(vae=opened.vae, recipe=recipe, model=facts["model"]["sha256"]),
            share=Share(number=number, of=count),
            workers=settings.dataloader_num_workers,
        )
    return _said(done, Path(settings.out), notes=opened.notes)


def run_decode(settings: DecodeSettings) -> str:
    """Decode what was asked for; what to say of it."""
    flags = flags_of(settings)
    opened = _opened(settings)
    budget = memory_wish(flags["memory"], settings.memory)
    wish = Wish(
        codec=settings.codec,
        tile=tile_wish(flags["tile"], settings.tile),
        budget=available_bytes(str(opened.device)) if budget is None else budget,
        any_model=settings.any_model,
        overwrite=settings.overwrite,
    )
    out = Path(settings.out)
    with held(out):
        done = decode_latents(Path(settings.latents), out, opened=opened, wish=wish)
    notes = "".join(f"warning: {printable(note)}\n" for note in (*opened.notes, *done.notes))
    return f"{notes}{printable(settings.out)}: {done.made} decoded, {done.kept} were there already\n"


def _opened(settings: EncodeSettings | DecodeSettings) -> Opened:
    """The model. Under torchrun each process of a machine takes a GPU of its own.

    ConfigError before the work if the weights are not there or nothing can be written.
    """
    if not Path(settings.checkpoint).exists():
        raise ConfigError(f"--checkpoint {printable(settings.checkpoint)}: there is no such file or folder")
    refuse_place(Path(settings.out))
    device = pick_device(settings.device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return open_vae(
        Path(settings.checkpoint),
        prefer=settings.weights,
        model_config=None if settings.model_config is None else Path(settings.model_config),
        device=device,
        precision=settings.precision,
    )


def _facts(settings: EncodeSettings, source: ClipSource, *, opened: Opened, recipe: Recipe) -> Record:
    """What the set says of itself: all that its latents follow from, and who began it."""
    geometry = opened.vae.geometry
    digest = hashlib.sha256()
    for index in range(len(source)):
        video = source[index]
        digest.update(json.dumps([video.id, video.caption]).encode() + b"\n")
    return {
        "format": FORMAT,
        "model": {**opened.loaded.facts(), "precision": opened.precision.name},
        "geometry": {
            "temporal": geometry.temporal,
            "spatial": geometry.spatial,
            "channels": geometry.channels,
        },
        "store": recipe.store,
        "dtype": recipe.dtype,
        **({"seed": recipe.seed} if recipe.store == "sample" else {}),
        "cut": recipe.cut.facts(),
        "caption_column": recipe.column,
        "tile": settings.tile,
        "memory": settings.memory,
        "container": settings.format_,
        "videos_per_shard": settings.videos_per_shard,
        "videos": len(source),
        "videos_sha256": digest.hexdigest(),
        "memory_bytes": recipe.budget,
        "made_by": {"causalvae": __version__, "torch": torch.__version__, "device": opened.device.type},
    }


def _said(done: Encoded, out: Path, *, notes: tuple[str, ...]) -> str:
    """What there is to say at the end."""
    lines = [f"warning: {printable(note)}" for note in (*notes, *done.notes)]
    lines += [f"warning: {printable(note)}" for note in in_words(done.broken, most=SHOWN_LEFT_OUT)]
    shown = printable(str(out))
    if done.merged is not None:
        lines.append(f"{shown}: {done.merged.samples} latents; {len(done.merged.broken)} videos are left out")
    elif done.missing:
        lines.append(
            f"{shown}: {done.done} videos done; {done.missing} parts of the set are still to be made"
        )
    else:
        lines.append(f"{shown}: whole; another process is writing its index")
    return "".join(f"{line}\n" for line in lines)
