"""The report of a training that goes on, served to this machine's browser and to nobody else.

Only 127.0.0.1 is listened to. A request needs the secret of the address that was printed, and a Host header
that names this machine, so that a page from elsewhere can't read the report through the browser.
"""

import hashlib
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from causalvae.errors import ConfigError, RunError
from causalvae.report.build import build_report
from causalvae.report.films import Sprites

HOST = "127.0.0.1"
WATCHED = (".", "samples", "eval", "checkpoints")  # folders of a run whose files are looked at
Answer = tuple[bytes, str]  # body and type


class Watch:
    """A server for the pages of some runs. `address` is what to open; serve() answers until stop()."""

    def __init__(
        self, paths: Sequence[Path], *, defaults: Mapping[str, str], lang: str, every: float, port: int
    ) -> None:
        """Listen. ConfigError if the port is taken."""
        self._paths, self._defaults, self._lang, self._every = list(paths), defaults, lang, every
        self._films: Sprites = {}
        self._page: tuple[str, bytes] = ("", b"")
        self._building = threading.Lock()
        secret = secrets.token_urlsafe(16)
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler(self.answer, secret))
        except OSError as error:
            raise ConfigError(
                f"--port {port}: can't be listened to: {error.strerror}; choose another"
            ) from error
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.address = f"http://{HOST}:{self.port}/{secret}/"

    def serve(self) -> None:
        """Answer requests until stop() is called by another thread."""
        self._server.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """End serve() and stop listening."""
        self._server.shutdown()
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._server.server_close()

    def answer(self, name: str) -> Answer | None:
        """The page, or the word that changes when it does, by the name behind the secret. None for others."""
        if name == "version":
            return version(self._paths).encode(), "text/plain; charset=utf-8"
        if name in ("", "page"):
            return self.page(), "text/html; charset=utf-8"
        return None

    def page(self) -> bytes:
        """The newest page. It is built again only after a change, and by one request at a time."""
        with self._building:
            now = version(self._paths)
            if self._page[0] != now:
                report = build_report(
                    self._paths,
                    defaults=self._defaults,
                    lang=self._lang,
                    every=self._every,
                    known=self._films,
                )
                self._page = (now, report.page)
            return self._page[1]


def version(paths: Sequence[Path]) -> str:
    """A word that changes when a file of the runs does."""
    facts: list[str] = []
    for path in paths:
        folders = [path / name for name in WATCHED] if path.is_dir() else []
        found = [item for folder in folders if folder.is_dir() for item in folder.iterdir()]
        for item in sorted([path, *found]):
            try:
                state = item.stat()
            except OSError:  # it went away
                continue
            facts.append(f"{item} {state.st_mtime_ns} {state.st_size}")
    return hashlib.sha256("\n".join(facts).encode(errors="backslashreplace")).hexdigest()[:16]


HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def _handler(answer: Callable[[str], Answer | None], secret: str) -> type[BaseHTTPRequestHandler]:
    """The class that http.server makes one of for each request. GET is all that it knows."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "causalvae", ""

        def do_GET(self) -> None:
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
                return self._send(403, b"this server answers to 127.0.0.1 only\n")
            first, _, name = self.path.removeprefix("/").partition("/")
            if not secrets.compare_digest(first.encode(), secret.encode()):
                return self._send(404, b"not found\n")
            try:
                found = answer(name)
            except RunError as error:  # the folder went away
                return self._send(503, f"{error}\n".encode(errors="backslashreplace"))
            if found is None:
                return self._send(404, b"not found\n")
            return self._send(200, found[0], kind=found[1])

        def _send(self, status: int, body: bytes, *, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            about = {"Content-Type": kind, "Content-Length": str(len(body))}
            for name, value in (about | HEADERS).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's
            """Nothing: the terminal is for the person."""

    return Handler


def watch(
    paths: Sequence[Path],
    *,
    defaults: Mapping[str, str],
    lang: str,
    every: float,
    port: int,
    say: Callable[[str], object],
) -> int:
    """Serve until Ctrl-C. say: told the address once it answers. Returns the exit status."""
    build_report(paths, defaults=defaults, lang=lang, every=every)
    server = Watch(paths, defaults=defaults, lang=lang, every=every, port=port)
    say(f"open {server.address}\nCtrl-C stops it\n")
    try:
        server.serve()
    except KeyboardInterrupt:
        say("\n")
    finally:
        server.close()
    return 0
