"""Fetches a file of weights from its address: resumed, checked by its hash, whole or not at all."""

import fcntl
import http.client
import os
import re
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from causalvae.errors import ConfigError, WeightsError
from causalvae.files import disk_error, sha256, sync

SILENCE_SECONDS = 30  # without a byte, after which a server counts as gone
BLOCK = 1 << 18
SCHEMES = ("http", "https")
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def fetch(url: str, path: Path, *, digest: str, progress: bool) -> Path:
    """The file at `path`, fetched from `url` if it is not there; a file that is there is believed.

    digest: SHA-256 in hexadecimal, or its first digits. What arrived stays in `NAME.partial` until all is
    there and right, and the next call goes on from it. Two processes take turns, and the second finds the
    file. progress: draw a bar, if standard error is a terminal.
    ConfigError for an address that is neither http nor https, WeightsError if the file can't be had.
    """
    _check_scheme(url)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _turn(path.with_name(f"{path.name}.lock")), _bar(path.name, shown=progress) as bar:
            if not path.is_file():
                _bring(url, path, digest=digest, bar=bar)
    except OSError as error:
        raise disk_error(error, path) or WeightsError(f"{path}: {error}", status=1) from error
    return path


def _bring(url: str, path: Path, *, digest: str, bar: Progress) -> None:
    partial = path.with_name(f"{path.name}.partial")
    resumed = partial.is_file() and partial.stat().st_size > 0
    _receive(url, partial, bar=bar)
    if resumed and not sha256(partial).startswith(digest):  # what was there belonged to another file
        partial.unlink()
        _receive(url, partial, bar=bar)
    found = sha256(partial)
    if not found.startswith(digest):
        partial.unlink()
        raise WeightsError(
            f"{url}: what arrived is another file: its SHA-256 is {found}, not {digest}; nothing was kept",
            status=1,
        )
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def _receive(url: str, partial: Path, *, bar: Progress) -> None:
    """Add to `partial` until it is whole. Each broken connection that brought something is followed by
    another one, which goes on from there.
    """
    while True:
        before = partial.stat().st_size if partial.is_file() else 0
        reason = _one_connection(url, partial, start=before, bar=bar)
        if reason is None:
            return
        after = partial.stat().st_size
        if after <= before:
            raise WeightsError(
                f"{url}: {reason} after {after:,} bytes; they are kept, and the next attempt goes on from "
                "there",
                status=1,
            )


def _one_connection(url: str, partial: Path, *, start: int, bar: Progress) -> str | None:
    """Receive once, from byte `start` on; None if the file is whole now, else why it is not."""
    headers = {"User-Agent": "causalvae", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with build_opener(ProxyHandler(), _Redirects()).open(
            Request(url, headers=headers), timeout=SILENCE_SECONDS
        ) as response:
            at, size = _place(response, url)
            if at not in (0, start):
                raise WeightsError(f"{url}: the server sent bytes from {at}, not from {start}", status=1)
            return _store(response, partial, at=at, size=size, bar=bar)
    except HTTPError as error:
        error.close()
        if error.code == 416 and start:  # nothing comes after these bytes: the hash decides
            return None
        raise WeightsError(f"{url}: the server says {error.code} {error.reason}", status=1) from error
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        partial.touch()
        reason = error.reason if isinstance(error, URLError) else error
        if start == 0 and partial.stat().st_size == 0:
            raise WeightsError(
                f"{url}: can't be reached: {reason or type(error).__name__}", status=1
            ) from error
        return f"the connection broke ({reason or type(error).__name__})"


def _place(response: HTTPResponse, url: str) -> tuple[int, int | None]:
    """Where the body begins in the file, and how long the file is, if the server tells."""
    if response.status == 206:
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            raise WeightsError(f"{url}: the server sent a part and did not say which", status=1)
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _store(response: HTTPResponse, partial: Path, *, at: int, size: int | None, bar: Progress) -> str | None:
    task = bar.tasks[0].id
    bar.update(task, total=size, completed=at)
    with partial.open("ab") as file:
        file.truncate(at)
        while block := response.read1(BLOCK):  # what is there: a slow line loses none of it
            file.write(block)
            bar.advance(task, len(block))
        arrived = file.tell()
    return (
        None if size is None or arrived >= size else f"the connection broke ({arrived:,} of {size:,} bytes)"
    )


class _Redirects(HTTPRedirectHandler):
    """Follows to http and https only, and never from https to http."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """The request that follows, or WeightsError."""
        target = urlsplit(newurl).scheme
        if target not in SCHEMES or (urlsplit(req.full_url).scheme, target) == ("https", "http"):
            raise WeightsError(f"{req.full_url}: the server sends on to {newurl}, which is refused", status=1)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.hostname or not url.isascii():
        raise ConfigError(f"{url}: not an address; it must begin with https:// or http://")


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with lock.open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _bar(name: str, *, shown: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and sys.stderr.isatty()),
    )
    with bar:
        bar.add_task(name, total=None)
        yield bar
