"""The Dockerfile: what it is made of, by a parser of such files; and that its check of health tells well from ill."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

import wsi_gradcam
from tests.runs import ROOT

FILE = DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes()))
PORT = 8765  # of `view`


def stages() -> list[list[tuple[str, str]]]:
    """(instruction, value) of each stage, as (FROM, ...) begins it."""
    found: list[list[tuple[str, str]]] = []
    for part in FILE.structure:
        if part["instruction"] == "FROM":
            found.append([])
        if found and part["instruction"] != "COMMENT":
            found[-1].append((part["instruction"], part["value"]))
    return found


def last(instruction: str) -> str:
    return [value for name, value in stages()[-1] if name == instruction][-1]


def test_what_is_run_is_a_stage_without_the_tools_that_build() -> None:
    build, final = stages()
    assert build[0][1].endswith(" AS build")
    assert [value for name, value in final if name == "COPY"] == ["--from=build /opt/wsi-gradcam /opt/wsi-gradcam"]
    assert not re.search(r"\b(npm|pip)\b", " ".join(value for name, value in final if name == "RUN"))
    assert json.loads(last("ENTRYPOINT")) == ["wsi-gradcam"]


def test_the_user_is_a_number_after_all_that_root_does() -> None:
    names = [name for name, _ in stages()[-1]]
    assert last("USER") == "1000"
    assert "--uid 1000" in last("RUN")
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :])


def test_a_compiler_is_for_gpus_and_openvino_for_cpus() -> None:
    """Triton compiles for GPUs; OpenVINO runs on CPUs."""
    assert re.search(r'if \[ -z "\$TORCH_INDEX" \]; then .* gcc libc6-dev', last("RUN"))
    (install,) = (value for _, value in stages()[0] if "without-torch.txt" in value)
    (extras,) = re.findall(r'"\.\[(.*)\]"', install)
    plain, _, on_cpus = extras.partition("${")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"cluster", "viewer", "remote", "timm"} <= set(plain.split(",")) <= known.keys()
    assert on_cpus == "TORCH_INDEX:+,engines}"


def test_labels_say_what_it_is() -> None:
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in FILE.labels.items()}
    assert labels["version"] == wsi_gradcam.__version__
    assert labels["licenses"] == "Apache-2.0"
    assert labels.keys() >= {"title", "description", "revision"}


def test_all_that_it_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [value.split()[:-1] for name, value in stages()[0] if name == "COPY"]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists()
        assert name not in ignored


# --- whether `view` is well ------------------------------------------------------------------------------------------


class Answer(BaseHTTPRequestHandler):
    """A server with one answer to all."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def is_healthy(port: int) -> bool:
    """Whether the check says so, of another port than the image's, which the machine may use."""
    _, _, command = last("HEALTHCHECK").partition(" CMD ")
    program, flag, code = json.loads(command)
    assert (program, flag, code.count(str(PORT))) == ("python3", "-c", 1)
    done = subprocess.run([sys.executable, flag, code.replace(str(PORT), str(port))], capture_output=True, timeout=30)
    return done.returncode == 0


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (403, True), (500, False)])
def test_a_server_is_as_well_as_it_answers(status: int, healthy: bool) -> None:
    server = HTTPServer(("127.0.0.1", 0), type("Given", (Answer,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert is_healthy(server.server_port) == healthy
    finally:
        server.shutdown()
        server.server_close()


def test_a_container_without_a_server_is_well_and_one_that_does_not_answer_is_not() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert is_healthy(port)
        silent.listen()
        assert not is_healthy(port)
