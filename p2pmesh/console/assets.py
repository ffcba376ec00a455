"""The files of the web page, read once into memory.

A closed table of names: no request reaches the file system, so none can leave the folder, and
media types do not depend on what a machine's registry believes about `.js`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import p2pmesh
from p2pmesh.errors import LocalError

MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """One file of the page.

    Attributes:
        etag: Changes when the content does.
    """

    content: bytes = field(repr=False)
    media_type: str
    etag: str


def web_root() -> Path:
    """Return the page's folder: inside the installed package, or beside it in a source checkout."""
    package = Path(p2pmesh.__file__).parent
    packed = package / "web"
    return packed if packed.is_dir() else package.parent / "web"


def load_assets(root: Path) -> dict[str, Asset]:
    """Every file of the page by its name; blocks on the disk.

    Raises:
        LocalError: The installation lacks the page.
    """
    try:
        paths = [path for path in root.iterdir() if path.suffix in MEDIA_TYPES]
        assets = {path.name: _asset(path) for path in sorted(paths)}
    except OSError as exc:
        raise LocalError(
            f"Cannot read the console's page in {root} ({exc.strerror}); install p2pmesh again"
        ) from exc
    if "index.html" not in assets:
        raise LocalError(f"The console's page is missing in {root}; install p2pmesh again")
    return assets


def _asset(path: Path) -> Asset:
    content = path.read_bytes()
    return Asset(
        content=content,
        media_type=MEDIA_TYPES[path.suffix],
        etag=hashlib.sha256(content).hexdigest()[:16],
    )
