"""A fetched file is whole and right, or absent; what arrived is not fetched twice."""

import hashlib
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import pytest
from servers import Site, closed_address, serve

from causalvae.errors import ConfigError, RunError, WeightsError
from causalvae.fetch import fetch

DATA = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(DATA).hexdigest()
PROGRAM = """
import sys
from pathlib import Path
from causalvae.fetch import fetch
fetch(sys.argv[1], Path(sys.argv[2]), digest=sys.argv[3], progress=True)
"""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def command(url: str, path: Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, url, str(path), DIGEST]


@pytest.mark.parametrize("digest", [DIGEST, DIGEST[:8]], ids=["whole-hash", "first-digits"])
def test_a_file_arrives_whole_and_is_not_fetched_again(tmp_path: Path, digest: str) -> None:
    path = tmp_path / "new" / "weights.pth"
    with serve(Site({"/weights.pth": DATA})) as site:
        for _ in range(2):
            assert fetch(f"{site.url}/weights.pth", path, digest=digest, progress=False) == path
    assert path.read_bytes() == DATA
    assert len(site.requests) == 1
    assert not path.with_name("weights.pth.partial").exists()


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_a_fetch_goes_on_from_what_arrived_before(tmp_path: Path, *, ranges: bool) -> None:
    (tmp_path / "w.partial").write_bytes(DATA[:1000])
    with serve(Site({"/w": DATA}, ranges=ranges)) as site:
        fetch(f"{site.url}/w", tmp_path / "w", digest=DIGEST, progress=False)
    assert (tmp_path / "w").read_bytes() == DATA
    assert site.requests == [("/w", "bytes=1000-")]


def test_broken_connections_go_on_while_they_bring_something(tmp_path: Path) -> None:
    with serve(Site({"/w": DATA}, most=300_000)) as site:
        fetch(f"{site.url}/w", tmp_path / "w", digest=DIGEST, progress=False)
    assert (tmp_path / "w").read_bytes() == DATA
    assert [asked for _, asked in site.requests] == [
        None, "bytes=300000-", "bytes=600000-", "bytes=900000-"
    ]  # fmt: skip


def test_what_a_slow_server_has_sent_is_on_the_disk_before_the_rest_comes(tmp_path: Path) -> None:
    hold, partial = Event(), tmp_path / "w.partial"
    with serve(Site({"/w": DATA}, most=20_000, hold=hold)) as site:
        how = {"digest": DIGEST, "progress": False}
        fetching = Thread(target=fetch, args=(f"{site.url}/w", tmp_path / "w"), kwargs=how)
        fetching.start()
        while fetching.is_alive() and not (partial.exists() and partial.stat().st_size >= 10_000):
            time.sleep(0.01)
        there = fetching.is_alive()
        hold.set()
        fetching.join()
    assert there
    assert (tmp_path / "w").read_bytes() == DATA


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_a_connection_that_brings_nothing_ends_the_fetch_and_keeps_what_arrived(
    tmp_path: Path, *, ranges: bool
) -> None:
    most = 0 if ranges else 1000  # without ranges each attempt gets the same first bytes
    (tmp_path / "w.partial").write_bytes(DATA[:1000])
    with (
        serve(Site({"/w": DATA}, ranges=ranges, most=most)) as site,
        pytest.raises(WeightsError, match=r"broke .* after 1,000 bytes; they are kept") as caught,
    ):
        fetch(f"{site.url}/w", tmp_path / "w", digest=DIGEST, progress=False)
    assert caught.value.status == 1
    assert (tmp_path / "w.partial").read_bytes() == DATA[:1000]
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "rest", [b"x" * 1000, DATA + b"more", b"x" * len(DATA)], ids=["start", "longer", "as-long"]
)
def test_a_rest_of_another_file_is_thrown_away(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "w.partial").write_bytes(rest)
    with serve(Site({"/w": DATA})) as site:
        fetch(f"{site.url}/w", tmp_path / "w", digest=DIGEST, progress=False)
    assert (tmp_path / "w").read_bytes() == DATA


def test_another_file_than_the_pinned_one_is_not_kept(tmp_path: Path) -> None:
    with serve(Site({"/w": DATA + b"!"})) as site, pytest.raises(WeightsError, match=r"another file.*not"):
        fetch(f"{site.url}/w", tmp_path / "w", digest=DIGEST, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["w.lock"]


def test_what_a_server_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    with serve(Site({})) as site, pytest.raises(WeightsError) as caught:
        fetch(f"{site.url}/w", tmp_path / "w", digest=DIGEST, progress=False)
    assert str(caught.value) == f"{site.url}/w: the server says 404 Not Found"


def test_an_address_where_nobody_listens_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"can't be reached: .*refused") as caught:
        fetch(f"{closed_address()}/w", tmp_path / "w", digest=DIGEST, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///etc/hosts", "data:,hello", "b.pth", "http:///b"])
def test_only_addresses_of_the_web_are_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        fetch(url, tmp_path / "w", digest=DIGEST, progress=False)


def test_redirects_are_followed_on_the_web_and_nowhere_else(tmp_path: Path) -> None:
    redirects = {"/a": "/w", "/b": "ftp://127.0.0.1/w", "/c": "file:///etc/hosts"}
    with serve(Site({"/w": DATA}, redirects=redirects)) as site:
        fetch(f"{site.url}/a", tmp_path / "a", digest=DIGEST, progress=False)
        assert (tmp_path / "a").read_bytes() == DATA
        for name in ("b", "c"):
            with pytest.raises(WeightsError, match=r"refused|not allowed"):
                fetch(f"{site.url}/{name}", tmp_path / name, digest=DIGEST, progress=False)


def test_two_processes_fetch_a_file_once(tmp_path: Path) -> None:
    with serve(Site({"/w": DATA})) as site:
        started = [subprocess.Popen(command(f"{site.url}/w", tmp_path / "w")) for _ in range(2)]
        assert [process.wait() for process in started] == [0, 0]
    assert (tmp_path / "w").read_bytes() == DATA
    assert len(site.requests) == 1


def test_a_terminal_sees_a_bar_and_a_file_sees_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with serve(Site({"/w": DATA})) as site:
        subprocess.run(command(f"{site.url}/w", tmp_path / "bar"), stderr=theirs, check=True)
        quiet = subprocess.run(command(f"{site.url}/w", tmp_path / "no"), capture_output=True, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "bar" in shown
    assert "1.0" in shown  # megabytes
    assert (quiet.stdout, quiet.stderr) == (b"", b"")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with serve(Site({"/w": DATA})) as site, pytest.raises(RunError, match="can't be written"):
        fetch(f"{site.url}/w", tmp_path / "file" / "w", digest=DIGEST, progress=False)
    assert site.requests == []
