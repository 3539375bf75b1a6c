"""The page at `/`: concepts as cards, and a prompt that is drawn as it is typed.

Three files, served as they are: no build step, nothing from another host.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, Response

_HERE = Path(__file__).parent
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_PATHS = tuple(_FILES)
# Scripts, styles and requests of this page go to its own host only; nobody may frame it.
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Add the page's routes."""
    for path, (name, kind) in _FILES.items():
        _add(app, path, name, kind)


def _add(app: FastAPI, path: str, name: str, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_HERE / name, media_type=kind, headers=_HEADERS)
