"""A dataset with everything in it that a scan has to tell apart, and the scan of a folder."""

import shutil
from pathlib import Path

from media import BUNDLED, broken_entries, damaged, write_film
from test_index import make_old

from causalvae.data.index import prepare
from causalvae.data.scan import Reading, Scan, scan
from causalvae.data.sources import open_source

READING = Reading(workers=0)


def write_dataset(folder: Path) -> Path:
    """Sound films of two lengths and sizes, two with the same bytes, and things that are no films."""
    broken_entries(folder)
    for number in range(3):
        write_film(folder / f"long{number}.mp4", frames=40 + number, options={"g": "6"})
    write_film(folder / "short.mp4", frames=4, size=(96, 128))
    write_film(folder / "still.png", codec="png", frames=1, pixels="rgb24")
    shutil.copy(folder / "long1.mp4", folder / "twin.mp4")
    damaged(BUNDLED / "city_spire.mp4", folder / "half.mp4", first=0.6)
    for path in folder.iterdir():
        if path.is_file():
            make_old(path)
    return folder


def scanned(folder: Path, *, home: Path | None = None, reading: Reading = READING) -> Scan:
    """home: where what is known is kept."""
    return scan(
        open_source(str(folder)),
        name=str(folder),
        reading=reading,
        index=None if home is None else prepare(home)[0],
        progress=lambda *_: None,
    )
