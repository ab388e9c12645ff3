"""Films of the worst clips of an evaluation, beside its file: what the players of the report show."""

import heapq
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from causalvae.data.encode import side_by_side, write_video
from causalvae.files import disk_error, remove

MOST = 8  # clips of an evaluation that get a film
Json = Mapping[str, Any]  # Any: JSON values nest


class Worst:
    """The worst clips of those that were offered, with their pixels; at most `most` are in memory."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._heap: list[tuple[float, int, Tensor, Tensor]] = []  # the best of the worst is the first

    def offer(self, place: int, record: Json, *, clip: Tensor, recon: Tensor) -> None:
        """One clip. place: among all of the evaluation. clip, recon: uint8 3 t h w."""
        entry = (record["metrics"]["mse"], -place, clip, recon)
        if len(self._heap) < self.most:
            heapq.heappush(self._heap, entry)
        elif self.most and entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def films(self) -> dict[int, Tensor]:
        """By place: the clip and beside it its reconstruction, uint8 t h 2w 3."""
        return {-place: as_film(clip, recon) for _, place, clip, recon in self._heap}


def as_film(clip: Tensor, recon: Tensor) -> Tensor:
    """uint8 3 t h w each -> beside each other, uint8 t h 2w 3."""
    return side_by_side(clip.permute(1, 2, 3, 0), recon.permute(1, 2, 3, 0))


def worst_places(records: Iterable[Json], *, most: int) -> list[int]:
    """Places of the records with the largest errors, worst first."""
    errors = ((-record["metrics"]["mse"], place) for place, record in enumerate(records))
    return [place for _, place in heapq.nsmallest(most, errors)]


def film_folder(result: Path) -> Path:
    """Where the films of an evaluation's JSON file are."""
    return result.with_suffix(".films")


def write_films(folder: Path, films: Mapping[int, Tensor]) -> dict[int, str]:
    """Films t h 2w 3 by place, as a folder that is there whole or not at all; their names by place."""
    partial = folder.with_name(f".{folder.name}.partial")
    names = {place: f"clip{place:06d}.mp4" for place in films}
    try:
        remove(partial)
        partial.mkdir(parents=True)
        for place, film in films.items():
            write_video(partial / names[place], film)
        remove(folder)
        os.rename(partial, folder)
    except OSError as error:
        raise disk_error(error, folder) or error from error
    finally:
        remove(partial)
    return names


def with_films(records: Collection[Json], names: Mapping[int, str]) -> list[dict[str, Any]]:  # Any: as above
    """Records of clips, that tell the file of their film where they have one."""
    return [
        {**record, **({"film": names[place]} if place in names else {})}
        for place, record in enumerate(records)
    ]
