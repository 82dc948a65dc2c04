"""OpenSeadragon is fetched by npm, checked, and laid where the wheel takes it from."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import os
import stat
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.runs import ROOT


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """hatch_build.py as a module."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(files: dict[str, bytes]) -> bytes:
    """A gzipped tar as npm makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def digest_of(data: bytes) -> str:
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm of ours, alone on the path."""
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin" if script else str(folder))


def test_the_files_of_the_right_package_are_laid(hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = package({inner: name.encode() for inner, name in hook.FILES.items()} | {"package/other.js": b"x"})
    (tmp_path / "made.tgz").write_bytes(data)
    fake_npm(tmp_path, f'shift $(($# - 1)); cp {tmp_path}/made.tgz "$1/openseadragon-6.1.1.tgz"', monkeypatch)
    monkeypatch.setattr(hook, "SHA512", digest_of(data))
    monkeypatch.setattr(hook.unpacked, "__defaults__", (digest_of(data),))
    hook.lay(tmp_path / "vendor")
    assert sorted(path.name for path in (tmp_path / "vendor").iterdir()) == sorted([*hook.FILES.values(), hook.STAMP])
    fake_npm(tmp_path, "exit 1", monkeypatch)
    hook.lay(tmp_path / "vendor")  # they are there: npm is not asked
    (tmp_path / "vendor" / hook.STAMP).write_text("another version", encoding="utf-8")
    with pytest.raises(hook.FetchError, match="failed"):
        hook.lay(tmp_path / "vendor")


def test_another_package_is_not_used(hook: Any) -> None:
    with pytest.raises(hook.FetchError, match="it is not used"):
        hook.unpacked(package({}))


@pytest.mark.parametrize(("script", "message"), [("exit 7", "failed"), ("exit 0", "made 0 files")])
def test_what_npm_does_not_give_is_said(
    hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    fake_npm(tmp_path, script, monkeypatch)
    with pytest.raises(hook.FetchError, match=message):
        hook.fetched()


def test_without_npm_the_build_goes_on_and_warns(hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hook, "VENDOR", tmp_path / "vendor")
    warned: list[str] = []
    made = hook.CustomBuildHook.__new__(hook.CustomBuildHook)
    app = type("App", (), {"display_warning": lambda self, text: warned.append(text)})()
    monkeypatch.setattr(hook.CustomBuildHook, "app", app, raising=False)
    made.initialize("standard", {})
    assert "npm is not installed" in warned[0]
    assert not (tmp_path / "vendor").exists()


def test_the_page_s_files_are_in_the_wheel() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert settings["artifacts"] == ["/wsi_gradcam/viewer/page/vendor/*"]
    assert "custom" in settings["hooks"]
    assert "/hatch_build.py" in settings["targets"]["sdist"]["include"]


def test_the_image_is_built_with_all_that_the_package_is_built_from() -> None:
    copied = [
        word for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:5] == "COPY " for word in line.split()
    ]
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "wsi_gradcam"} <= set(copied)
