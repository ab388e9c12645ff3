"""A real HTTP server on this machine, well-behaved or not, for tests of what is fetched."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


@dataclass
class Site:
    """What is served, and how. requests: the path and the Range header of each, as they came.

    most: bytes of a body, after which the connection is cut, or waits for `hold`. redirects: where a path
    sends on to.
    """

    files: dict[str, bytes]
    ranges: bool = True
    most: int | None = None
    hold: Event | None = None
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    """The site at http://127.0.0.1:PORT, in a thread, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            site.requests.append((self.path, asked))
            if self.path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[self.path])
                self.end_headers()
            elif self.path not in site.files:
                self.send_error(404)
            else:
                self.send_file(site.files[self.path], asked)

        def send_file(self, data: bytes, asked: str | None) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", asked or "") if site.ranges else None
            start = int(match[1]) if match else 0
            if match and start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            body = data[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if site.most is None else body[: site.most])
            if site.hold is not None and site.most is not None:
                site.hold.wait()
                self.wfile.write(body[site.most :])
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


def closed_address() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
