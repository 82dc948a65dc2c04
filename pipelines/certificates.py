"""Create a key and its certificate, with which a Dask cluster answers only its own processes.

    eval "$(python pipelines/certificates.py /shared/me/tls)"

creates the folder, which nobody else can read, and prints the variables by which `dask scheduler`, `dask worker` and
`wsi-gradcam` find the files. Whoever has the key can run programs on the cluster as you. The recipes for queues and SSH
create a key for each run, and remove it afterwards.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import dask
from distributed import Security

CERTIFICATE, KEY = "certificate.pem", "key.pem"


def main() -> int:
    """Create the files, and print the variables."""
    parser = argparse.ArgumentParser(description="Create a key and a certificate for a Dask cluster.")
    parser.add_argument("folder", type=Path, help="a new folder that all nodes can see")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists; give a folder that does not")
    folder.mkdir(mode=0o700, parents=True)
    write_key(folder)
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables(folder.absolute()).items()))
    return 0


def write_key(folder: Path) -> None:
    """Write a new key and its certificate into a folder, for this user's eyes only."""
    made = Security.temporary()
    for name, text in ((CERTIFICATE, made.tls_ca_file), (KEY, made.tls_client_key)):
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)


def variables(folder: Path) -> dict[str, str]:
    """Return the environment in which Dask's processes use the key in a folder, and refuse to work without it."""
    files = {f"{role}__{kind}": name for role in ROLES for kind, name in (("CERT", CERTIFICATE), ("KEY", KEY))}
    found = {f"TLS__{name}": str(folder / file) for name, file in ({"CA_FILE": CERTIFICATE} | files).items()}
    found |= {"REQUIRE_ENCRYPTION": "True", "DEFAULT_SCHEME": "tls"}
    return {f"DASK_DISTRIBUTED__COMM__{name}": value for name, value in found.items()}


ROLES = ("SCHEDULER", "WORKER", "CLIENT")


def flags(folder: Path) -> list[str]:
    """Return the arguments by which a `dask worker` on another machine finds the files in a folder."""
    return [
        "--tls-ca-file",
        f"{folder / CERTIFICATE}",
        "--tls-cert",
        f"{folder / CERTIFICATE}",
        "--tls-key",
        f"{folder / KEY}",
    ]


@contextmanager
def made_for_this_run(dashboard: str) -> Iterator[Path]:
    """Create a key in a new folder of the working directory, which workers see, for this process, as a context.

    Without an address for the dashboard, Dask's HTTP server has no pages. Its scratch folder, from which its processes
    import, is a new one too, and not one in /tmp that may belong to another user.
    """
    with TemporaryDirectory(prefix=".wsi-gradcam-tls-", dir=Path.cwd()) as folder:
        write_key(Path(folder))
        os.environ.update(variables(Path(folder)), DASK_TEMPORARY_DIRECTORY=folder)
        dask.config.refresh()
        with dask.config.set({} if dashboard else {"distributed.scheduler.http.routes": []}):
            yield Path(folder)


def scheduler_options(dashboard: str) -> dict[str, object]:
    """Return a scheduler's options for its dashboard: the address to listen on, or that there is none."""
    return {"dashboard": bool(dashboard), "dashboard_address": dashboard or "127.0.0.1:0"}


if __name__ == "__main__":
    raise SystemExit(main())
