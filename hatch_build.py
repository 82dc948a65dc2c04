"""Fetches OpenSeadragon, which the viewer's page shows slides with, when the package is built.

`python hatch_build.py` lays it into the source tree by hand. What is fetched is checked by its sha512 and is no part of
the repository.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # by hand, where hatchling is not installed
    BuildHookInterface = object  # type: ignore[assignment,misc]

PACKAGE = "openseadragon@6.1.1"
SHA512 = "g4iKe2q8B642SaBT3+x4ZF3/8b1TxPPydyjmtrOLgDrlYWMKd9ZXM+1Cb/xa9DVySkvs/7l6HR1nHKfD5F3Tsw=="
# Where they are in the package, and what they are called in ours.
FILES = {
    "package/build/openseadragon/openseadragon.min.js": "openseadragon.min.js",
    "package/LICENSE.txt": "OPENSEADRAGON_LICENSE.txt",
}
VENDOR = Path(__file__).resolve().parent / "wsi_gradcam" / "viewer" / "page" / "vendor"
STAMP = "sha512.txt"  # of the package that the files are from
TIMEOUT_S = 120


class FetchError(Exception):
    """OpenSeadragon cannot be had."""


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before wheel, sdist and editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fetch what is missing; without npm or a network the package is built without it, and says so."""
        try:
            lay(VENDOR)
        except FetchError as error:
            self.app.display_warning(f"built without the viewer's page: {error}")


def lay(folder: Path) -> None:
    """Put the files into a folder, unless they are there.

    Raises:
        FetchError: npm is missing or fails, or what it gives is not what is expected.
    """
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == SHA512 and all((folder / name).is_file() for name in FILES.values()):
        return
    files = unpacked(fetched())
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    stamp.write_text(SHA512)


def fetched() -> bytes:
    """The package as npm gives it, a gzipped tar."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"npm is not installed, so {PACKAGE} cannot be fetched; install Node.js and build again")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", folder]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            raise FetchError(f"npm pack {PACKAGE} failed: {error.stderr.strip()[-300:]}") from error
        except subprocess.TimeoutExpired as error:
            raise FetchError(f"npm pack {PACKAGE} took more than {TIMEOUT_S} s; check the network") from error
        packed = sorted(Path(folder).glob("*.tgz"))
        if len(packed) != 1:
            raise FetchError(f"npm pack {PACKAGE} made {len(packed)} files, expected one")
        return packed[0].read_bytes()


def unpacked(package: bytes, sha512: str = SHA512) -> dict[str, bytes]:
    """The files by our names, of a package with the right digest."""
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    if digest != sha512:
        raise FetchError(f"{PACKAGE} has sha512 {digest}, expected {sha512}; it is not used")
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        files = {name: archive.extractfile(inner) for inner, name in FILES.items()}
        return {name: file.read() for name, file in files.items() if file is not None}


if __name__ == "__main__":
    try:
        lay(VENDOR)
    except FetchError as problem:
        sys.exit(f"error: {problem}")
    print(VENDOR)
