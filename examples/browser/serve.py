#!/usr/bin/env python3
"""Serves this folder's page, a bundle and npm's packages on 127.0.0.1; needs nothing but Python.

    python serve.py BUNDLE

Any static file server will do that shows the same layout (see README.md). This one also sends the two headers without
which a browser refuses memory that threads share, so that the model runs on one thread and cannot be stopped.
"""

import argparse
import contextlib
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
PAGE_FILES = ("index.html", "page.js", "worker.js", "style.css")
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# What a machine's own table says of these may be wrong, and a browser then refuses them.
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}


class Handler(SimpleHTTPRequestHandler):
    """Gives out the page's files, and what lies inside the folders that it was given."""

    def __init__(self, *args: Any, folders: Mapping[str, Path], **settings: Any) -> None:
        self._folders = folders
        super().__init__(*args, **settings)

    def send_head(self) -> BytesIO | BinaryIO | None:
        """The file that was asked for, its headers sent; None once an error was sent instead."""
        if self._file() is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def translate_path(self, path: str) -> str:
        """The place of what was asked for, which `send_head` has found to exist."""
        return str(self._file())

    def guess_type(self, path: str | PathLike[str]) -> str:
        """The media type of a file."""
        return TYPES.get(Path(path).suffix) or super().guess_type(fspath(path))

    def end_headers(self) -> None:
        """Send the headers that every answer carries, and the end of them."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _file(self) -> Path | None:
        """The file of the request's path; None if there is none inside the folders, links followed."""
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        if path in ("", *PAGE_FILES):
            return HERE / (path or "index.html")
        first, _, rest = path.partition("/")
        if first not in self._folders or "\0" in path:
            return None
        folder = self._folders[first]
        file = (folder / rest).resolve()
        return file if file.is_relative_to(folder) and file.is_file() else None


def make_server(bundle: Path, node_modules: Path, port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0 takes one that is free."""
    folders = {"bundle": bundle.resolve(), "node_modules": node_modules.resolve()}
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, folders=folders))


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve the example page with a bundle, on this machine only.")
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--node-modules", type=Path, default=HERE.parent / "node_modules", help="where npm put its packages"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    chosen = parser.parse_args()
    if not (chosen.bundle / "edgeprune.json").is_file():
        parser.error(f"{chosen.bundle} has no edgeprune.json; give the folder of a bundle")
    if not (chosen.node_modules / "@huggingface" / "transformers").is_dir():
        parser.error(f"{chosen.node_modules} has no @huggingface/transformers; install it there (see README.md)")
    with make_server(chosen.bundle, chosen.node_modules, chosen.port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
