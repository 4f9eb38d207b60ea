"""Serves one report's folder to a browser on this machine: loopback only, its own files only.

It knows HTTP; what it serves are the folder's files as they were named when it began, and nothing below or
beside.
"""

from __future__ import annotations

import mimetypes
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.errors import UsageError
from harness.signals import number_of

LOOPBACK = "127.0.0.1"
_PAGE = "report.html"
_HOSTS = ("127.0.0.1", "localhost")


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for some files."""

    files: dict[str, Path]
    server_version, sys_version = "Tierbench", ""

    def do_GET(self) -> None:
        """Send a file, or its headers alone."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in _HOSTS:  # a foreign name that was made to point here
            self.send_error(403, "only for this machine")
            return
        name = unquote(urlsplit(self.path).path).removeprefix("/") or _PAGE
        try:
            content = self.files[name].read_bytes()
        except (KeyError, OSError):
            self.send_error(404, "no such file in this report")
            return
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: whoever reads the page asked for it."""


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server that is bound but does not serve yet.

    Args:
        port: 0 takes any that is free.

    Raises:
        UsageError: if the folder has no report or the port cannot be bound.
    """
    if not (folder / _PAGE).is_file():
        raise UsageError(f"{folder} holds no {_PAGE}: write a report first, with --suite")
    found = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    files = {path.name: path for path in found if not path.name.startswith(".")}
    try:
        return ThreadingHTTPServer((LOOPBACK, port), type("Handler", (_Handler,), {"files": files}))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{LOOPBACK} port {port} cannot be bound ({reason}): give another --port") from error


def serve(folder: Path, port: int) -> None:
    """Serve until interrupted; prints the address.

    Raises:
        UsageError: as `make_server`.
    """
    with make_server(folder, port) as server:
        print(f"serving {folder} on http://{LOOPBACK}:{server.server_port}/ (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt as interrupt:
            if number_of(interrupt) != signal.SIGINT:
                raise
            print("\nstopped serving")
