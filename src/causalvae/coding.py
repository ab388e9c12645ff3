"""A model over videos of any length and any size, in constant memory.

`plan_coding` decides once how videos of a size are cut; `encoder` and `decoder` then take one video in pieces
of any length. A model that streams gives what the full pass gives, and so do tiles of a model whose norms
look at one position. Others are cut in windows and tiles that overlap and are blended, and the plan says so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch

from causalvae.coders import CodingPlan, decoder, encoder
from causalvae.errors import ConfigError
from causalvae.geometry import Geometry
from causalvae.machine import amount
from causalvae.models.build import Model
from causalvae.models.diffusers import DiffusersVAE
from causalvae.models.layers import FrameAttention
from causalvae.models.meta import LiveBytes, cpu_scratch, on_meta, tensors_of
from causalvae.tiles import BlendedTiles, ExactTiles, Sample, Size

CHUNKS = (8, 4, 2, 1)  # latent frames of a chunk. torch's kernels for small inputs are slow: longer is faster
WINDOWS = (9, 5)  # latent frames of a window
SHARED = 3  # latent frames that windows share, or a group more: their weights are 0, 1/3 and 2/3
TILES = (1024, 512, 256, 128)  # pixels along an edge
OVERLAP = 8  # a blended tile shares one part in eight of its edge
PUSHES = 3  # of a stream, after which its memory no longer grows
REST = 40 * 2**20  # bytes: code that torch loads, and memory that is freed and kept; measured on a CPU
MUCH_WORK = 0.3  # work that tiles add, from which on it is told
TileWish = Literal["auto", "off"] | Size


def plan_coding(
    vae: Model,
    *,
    height: int,
    width: int,
    tile: TileWish,
    budget: int | None,
    chunk: int | None = None,
) -> CodingPlan:
    """How videos of this size are cut, for encoding and for decoding.

    height, width: in pixels, multiples of the spatial factor. tile: auto as the budget asks for, off, or a
    size in pixels. budget: bytes that may be taken beside the weights, None for no limit. chunk: frames of a
    chunk, or of a window; None to choose.
    The first plan that fits, from the fastest to the smallest; if none does, the smallest, with a note.
    ConfigError for sizes that can't be.
    """
    size = (height, width)
    _check(vae.geometry, size=size, tile=tile, chunk=chunk)
    plans = list(_plans(vae, size=size, tile=tile, chunk=chunk))
    if budget is None and plans[0].tile is None:
        return replace(plans[0], notes=_notes(vae, plans[0]))
    twin, cpu = on_meta(vae), next(vae.parameters()).device.type != "cuda"
    tried: list[CodingPlan] = []
    for plan in plans:
        num_bytes = coding_bytes(twin, plan, size=size, cpu=cpu)
        tried.append(replace(plan, num_bytes=num_bytes))
        if budget is None or num_bytes <= budget:
            break
    best = min(tried, key=lambda plan: (budget is None or (plan.num_bytes or 0) > budget, plan.num_bytes))
    best = replace(best, extra_work=extra_work(twin, best, size=size))
    notes = (*_notes(vae, best), *_memory_notes(vae, best, tried=tried, size=size, budget=budget))
    return replace(best, notes=notes)


def coding_bytes(twin: Model, plan: CodingPlan, *, size: Size, cpu: bool = True) -> int:
    """Memory beside the weights that coding takes: the larger of encoding and decoding.

    twin: the model on the meta device, where a few chunks, or two windows, go through it. cpu: it will run on
    one, where convolutions take memory of their own.
    """
    geometry, peaks, scratch = twin.geometry, [], cpu_scratch if cpu else None
    latents = max(1, plan.chunk // geometry.temporal)
    pushes = PUSHES if plan.window is None else 2 + geometry.latent_frames(plan.window) // latents
    ways = ((encoder, 3, plan.chunk, size), (decoder, geometry.channels, latents, _latent(geometry, size)))
    for coder_of, channels, length, sides in ways:
        sample = Sample()
        with LiveBytes(scratch) as live, torch.device("meta"):
            live.hold(*tensors_of(twin))
            weights, coder = live.bytes, coder_of(twin, plan, sample=sample)
            for _ in range(pushes):
                coder.push(torch.empty(1, channels, length, *sides))
            peaks.append(live.peak - weights + sample.missing_bytes())
    return max(peaks) + REST


def extra_work(twin: Model, plan: CodingPlan, *, size: Size) -> float | None:
    """Work that tiles add, in parts of that of whole frames; None for these. twin: on the meta device."""
    if plan.tile is None:
        return None
    if plan.overlap is not None or isinstance(twin, DiffusersVAE):
        return BlendedTiles(twin, plan.tile, plan.overlap or (0, 0)).times(_latent(twin.geometry, size)) - 1
    with torch.no_grad():
        return ExactTiles(twin, tile=plan.tile).times(size) - 1


def _plans(vae: Model, *, size: Size, tile: TileWish, chunk: int | None) -> Iterator[CodingPlan]:
    """Plans from the fastest to the smallest."""
    tiles = _tiles(vae.geometry, size=size, tile=tile)
    blended = bool(vae.why_tiles_blend)
    for each in tiles if vae.streamable else ():
        # The largest tiles come before longer chunks where both are to be chosen.
        for frames in _chunks(vae.geometry, chunk, shortest=each is not None and tile == "auto"):
            yield CodingPlan(chunk=frames, tile=each, overlap=_overlap(vae.geometry, each, blended=blended))
    if vae.streamable and tile != "auto":
        return
    # What a stream remembers of every layer may be more than there is: windows remember nothing.
    for each in tiles[1:] if vae.streamable else tiles:
        for frames in _windows(vae.geometry, None if vae.streamable else chunk):
            shared = _shared(vae.geometry)
            yield CodingPlan(
                chunk=frames - shared,
                tile=each,
                overlap=_overlap(vae.geometry, each, blended=True),
                window=frames,
                shared=shared,
            )


def _tiles(geometry: Geometry, *, size: Size, tile: TileWish) -> list[Size | None]:
    """Sizes of tiles, the largest first; None for whole frames."""
    if tile == "off":
        return [None]
    if tile != "auto":
        within = (min(tile[0], size[0]), min(tile[1], size[1]))
        return [None if within == size else within]
    edges = [edge // geometry.spatial * geometry.spatial for edge in TILES]
    smaller = [(min(edge, size[0]), min(edge, size[1])) for edge in edges if edge >= _smallest(geometry)]
    return [None, *(each for each in smaller if each != size)]


def _chunks(geometry: Geometry, chunk: int | None, *, shortest: bool) -> list[int]:
    """Frames of a chunk, whole latent frames."""
    if chunk is not None:
        return [geometry.padded_frames(chunk + 1) - 1]
    return [latents * geometry.temporal for latents in (CHUNKS[-1:] if shortest else CHUNKS)]


def _windows(geometry: Geometry, chunk: int | None) -> list[int]:
    """Frames of a window: at least one group more than what two of them share."""
    group = geometry.temporal * geometry.group
    wanted = [chunk] if chunk is not None else [1 + geometry.temporal * (latents - 1) for latents in WINDOWS]
    least = _shared(geometry) + group
    return list(dict.fromkeys(max(least, 1 + (frames - 1) // group * group) for frames in wanted))


def _shared(geometry: Geometry) -> int:
    """Frames that two windows share."""
    return geometry.padded_frames(1 + geometry.temporal * (SHARED - 1))


def _overlap(geometry: Geometry, tile: Size | None, *, blended: bool) -> Size | None:
    """Pixels that two tiles share; None for whole frames and exact tiles."""
    if tile is None or not blended:
        return None
    least = 2 * geometry.spatial
    height, width = (max(least, geometry.padded_size(edge // OVERLAP)) for edge in tile)
    return height, width


def _smallest(geometry: Geometry) -> int:
    """Pixels along an edge of the smallest tile: twice what two of them share at least."""
    return 4 * geometry.spatial


def _latent(geometry: Geometry, size: Size) -> Size:
    return size[0] // geometry.spatial, size[1] // geometry.spatial


def _notes(vae: Model, plan: CodingPlan) -> tuple[str, ...]:
    """What the user should know of a plan."""
    notes: list[str] = []
    if not vae.streamable:
        notes.append(
            f"this model can't stream: {vae.why_not_streamable}; videos of more than {plan.window} frames "
            f"are cut in windows that share {plan.shared} frames and are blended"
        )
    if plan.tile is not None:
        attends = any(isinstance(module, FrameAttention) for module in vae.modules())
        if plan.overlap is not None and vae.why_tiles_blend:
            notes.append(f"tiles of this model are blended, as {vae.why_tiles_blend}")
        if attends and plan.overlap is not None:
            notes.append("its attention sees one tile at a time, not the frame")
        if attends and plan.overlap is None:
            notes.append("its attention sees whole frames at the size of the latent: that part is not tiled")
    if (plan.extra_work or 0.0) > MUCH_WORK:
        notes.append(f"tiles of {_by(plan.tile)} add {100 * (plan.extra_work or 0):.0f} % of work")
    return tuple(notes)


def _memory_notes(
    vae: Model, best: CodingPlan, *, tried: Iterable[CodingPlan], size: Size, budget: int | None
) -> tuple[str, ...]:
    """What the budget did to the plan."""
    if budget is None or best.num_bytes is None:
        return ()
    notes: list[str] = []
    exact = [plan.num_bytes for plan in tried if plan.window is None and plan.num_bytes is not None]
    if vae.streamable and best.window is not None:
        notes.append(
            f"streaming {_by(size)} takes {amount(min(exact))} and may take {amount(budget)}: videos of more "
            f"than {best.window} frames are cut in windows that share {best.shared} frames and are blended"
        )
    if best.num_bytes > budget:
        notes.append(
            f"coding {_by(size)} takes {amount(best.num_bytes)} even in the smallest pieces, and may take "
            f"{amount(budget)}"
        )
    return tuple(notes)


def _check(geometry: Geometry, *, size: Size, tile: TileWish, chunk: int | None) -> None:
    """ConfigError for sizes that can't be."""
    factor = geometry.spatial
    if min(size) < 1 or any(side % factor for side in size):
        raise ConfigError(f"frames of {_by(size)}: this model takes multiples of {factor}")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"a chunk of {chunk} frames: at least one is needed")
    if isinstance(tile, tuple) and (min(tile) < _smallest(geometry) or any(side % factor for side in tile)):
        raise ConfigError(
            f"tiles of {_by(tile)}: height and width must be multiples of {factor}, and at least "
            f"{_smallest(geometry)}"
        )


def _by(size: Size | None) -> str:
    return "x".join(map(str, size or ()))
