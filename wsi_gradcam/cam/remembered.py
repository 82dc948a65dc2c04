"""What `auto` chose on this machine before: so that runs which could share results get the same ones.

Timing is noisy, and a worker has fewer threads than a process that runs alone; without a memory the same command
could choose OpenVINO once and eager PyTorch the next time, whose values differ in the last bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.cam.choice import Choice
from wsi_gradcam.stores.files import write_atomic

if TYPE_CHECKING:
    import torch

PACKAGES = ("wsi-gradcam", "torch", "openvino")


def cache_file() -> Path:
    """Where choices are kept: below $XDG_CACHE_HOME, else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "wsi-gradcam" / "engines.json"


def choice_key(device: torch.device, *asked: Any) -> str:
    """Names a choice: the machine, the versions, and what was asked for."""
    machine = [platform.machine(), _processor(), str(device)]
    if device.type == "cuda":
        import torch

        machine.append(torch.cuda.get_device_name(device))
    return hashlib.sha256(json.dumps([machine, [_version(p) for p in PACKAGES], asked]).encode()).hexdigest()


def recall(key: str) -> Choice | None:
    """The choice kept under `key`; None where there is none, or the file cannot be read."""
    try:
        return Choice.from_json(json.loads(cache_file().read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(key: str, choice: Choice) -> None:
    """Keep a choice; not where the folder cannot be written."""
    path = cache_file()
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict):  # not ours, or damaged
        known = {}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**known, key: choice.to_json()}, indent=1).encode())


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
