"""Recipes for SSH and Kubernetes: what they would start; and whole runs, with workers on this machine."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import dask
import kubernetes_validate
import pytest
import yaml

from tests.clusters import printed, process, scheduler, worker
from tests.runs import ROOT, SMALL, differing, flags, rows_of, toy_file
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.errors import WorkerError
from wsi_gradcam.executors.dask.workers import connect

# What a remote machine does, done here; workers end with their scheduler.
SSH = '[ "$1 $2 $3" = "-o BatchMode=yes node1" ] || exit 255\nexec sh -c "$4" >{folder}/worker.log 2>&1\n'


def recipe(name: str, at: Path, *arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a recipe in the folder `at`, as a user does; programs in `path` come before the system's."""
    places = [str(path)] if path else []
    return subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / f"{name}.py"), *map(str, arguments)],
        cwd=at,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.pathsep.join([*places, os.environ["PATH"]])},
    )


def programs(folder: Path, **scripts: str) -> Path:
    """A folder of shell scripts with these names."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text.format(folder=folder)}", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide, a model, and its results in this process."""
    folder = tmp_path_factory.mktemp("made")
    write_marker_slide(folder / "a.tif", 390, 500, mpp=0.25, markers=[(200, 200)], marker_px=16)
    explain(folder / "a.tif", str(toy_file(folder, "pooled_linear")), folder / "serial", **SMALL)
    return folder


def arguments_of_explain(made: Path, out: Path) -> list[str]:
    return [
        str(made / "a.tif"),
        "--trust-code",
        "--model",
        str(made / "pooled_linear.yaml"),
        "--out",
        str(out),
        *flags(SMALL),
    ]


def option(words: list[str], name: str) -> str:
    assert words.count(name) >= 1, f"{name} is not among {words}"
    return words[len(words) - 1 - words[::-1].index(name) + 1]  # the last one counts


# --- SSH -------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_ssh_starts_a_worker_a_gpu_on_each_host(tmp_path: Path) -> None:
    done = recipe(
        "ssh", tmp_path, "--hosts", "node1,node2", "--per-host", "2", "--gpus", "--address", "10.0.0.1", "--print"
    )
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [words[:4] for words in commands] == [["ssh", "-o", "BatchMode=yes", f"node{n}"] for n in (1, 1, 2, 2)]
    workers = [shlex.split(words[4].partition(" && exec ")[2]) for words in commands]
    assert [words[:2] for words in workers] == [["env", f"CUDA_VISIBLE_DEVICES={n}"] for n in (0, 1, 0, 1)]
    for words in workers:
        assert words[2:7] == [sys.executable, "-m", "dask", "worker", "tls://10.0.0.1:8786"]
        assert (option(words, "--nthreads"), option(words, "--memory-limit")) == ("7", "0")
        assert option(words, "--resources") == "GPU=1,CPU=3"
        assert Path(option(words, "--tls-key")).parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == []  # the key has gone with the run


def test_ssh_without_gpus_promises_none(tmp_path: Path) -> None:
    done = recipe("ssh", tmp_path, "--hosts", "node1", "--python", "/opt/my env/python", "--print")
    (line,) = done.stdout.splitlines()
    assert "CUDA" not in line
    assert "--resources" not in line
    remote = shlex.split(line)[4]
    assert shlex.split(remote)[:3] == ["cd", str(tmp_path), "&&"]
    assert shlex.split(remote.partition(" && exec ")[2])[0] == "/opt/my env/python"


def test_workers_over_ssh_explain_as_this_process_does(made: Path, tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", ssh=SSH)
    out = tmp_path / "out"
    here = ("--hosts", "node1", "--address", "127.0.0.1", "--port", str(free_port()), "--dashboard", "127.0.0.1:0")
    done = recipe("ssh", tmp_path, *here, *arguments_of_explain(made, out), path=path)
    assert done.returncode == 0, done.stderr
    assert differing(out, made / "serial") == []
    failed = recipe(
        "ssh", tmp_path, *here, made / "a.tif", "--model", "nonsense", "--out", tmp_path / "none", path=path
    )
    assert failed.returncode == 2  # as explain's
    assert not rows_of(out)["a.tif"]["error"]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def manifests(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The DaskCluster and the Job."""
    claims = ("--image", "registry/wsi-gradcam:1", "--slides-claim", "archive", "--out-claim", "results")
    status, text, said = printed("kubernetes", ROOT, *claims, *arguments, printing=())
    assert status == 0, said
    assert "&id" not in text
    cluster, job = yaml.safe_load_all(text)
    assert (cluster["apiVersion"], cluster["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    return cluster, job


def pods(cluster: dict[str, Any], job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts = {part: cluster["spec"][part]["spec"] for part in ("worker", "scheduler")}
    return {**parts, "explain": job["spec"]["template"]["spec"]}


def test_all_pods_share_image_slides_and_results() -> None:
    for name, pod in pods(*manifests()).items():
        (container,) = pod["containers"]
        assert (container["name"], container["image"]) == (name, "registry/wsi-gradcam:1")
        *volumes, tls = pod["volumes"]
        claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in volumes}
        claims[tls["name"]] = tls["secret"]["secretName"]
        seen = {mount["mountPath"]: claims[mount["name"]] for mount in container["volumeMounts"]}
        assert seen == {"/slides": "archive", "/out": "results", "/tls": "wsi-gradcam-tls"}
        assert [m["mountPath"] for m in container["volumeMounts"] if m.get("readOnly")] == ["/slides", "/tls"]
        assert tls["secret"]["defaultMode"] == 0o440
        assert volumes[0]["persistentVolumeClaim"]["readOnly"]


def test_workers_have_gpus_only_when_asked_for() -> None:
    cluster, _ = manifests("--workers", "8", "--gpus", "1", "--cpus", "6", "--memory", "12Gi")
    worker = cluster["spec"]["worker"]
    (container,) = worker["spec"]["containers"]
    assert worker["replicas"] == 8
    assert container["resources"]["limits"] == {"cpu": "6", "memory": "12Gi", "nvidia.com/gpu": "1"}
    assert container["command"][:4] == ["dask", "worker", "--name", "$(DASK_WORKER_NAME)"]
    assert option(container["command"], "--nthreads") == "7"
    assert option(container["command"], "--memory-limit") == "0"
    assert option(container["command"], "--resources") == "GPU=1,CPU=3"
    (plain,) = manifests()[0]["spec"]["worker"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in plain["resources"]["limits"]
    assert option(plain["command"], "--nthreads") == "2"
    assert "--resources" not in plain["command"]


def test_the_job_finds_the_scheduler_through_its_service() -> None:
    cluster, job = manifests("--name", "lung", "--model", "oral-tumour", "--target", "tumour")
    service = cluster["spec"]["scheduler"]["service"]
    assert service["selector"] == {"dask.org/cluster-name": "lung", "dask.org/component": "scheduler"}
    (scheduler,) = cluster["spec"]["scheduler"]["spec"]["containers"]
    listening = {port["name"]: port["containerPort"] for port in scheduler["ports"]}
    assert {port["port"]: listening[port["targetPort"]] for port in service["ports"]} == {8786: 8786, 8787: 8787}
    assert scheduler["readinessProbe"]["httpGet"]["port"] in listening
    (client,) = job["spec"]["template"]["spec"]["containers"]
    assert client["args"] == [
        "explain",
        "/slides",
        "--wait-for-workers",
        "86400",
        "--model",
        "oral-tumour",
        "--target",
        "tumour",
        "--out",
        "/out",
        "--scheduler",
        "tls://lung-scheduler:8786",
    ]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy needs


def test_pods_answer_those_alone_that_have_the_key() -> None:
    cluster, job = manifests()
    for name, pod in pods(cluster, job).items():
        (container,) = pod["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert env["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "True"
        assert (
            env[f"DASK_DISTRIBUTED__COMM__TLS__{'CLIENT' if name == 'explain' else name.upper()}__KEY"]
            == "/tls/key.pem"
        )
        assert env["DASK_DISTRIBUTED__COMM__TLS__CA_FILE"] == "/tls/certificate.pem"
        assert "tls" in container.get("command", []) or "tls://wsi-gradcam-scheduler:8786" in [
            *container.get("command", []),
            *container.get("args", []),
        ]
    (scheduler,) = cluster["spec"]["scheduler"]["spec"]["containers"]
    routes = next(v["value"] for v in scheduler["env"] if v["name"].endswith("HTTP__ROUTES"))
    assert routes == "['distributed.http.health', 'wsi_gradcam.executors.dask.plugins']"


VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
ALL_FLAGS = (
    *("--gpus", "1", "--node-selector", "pool=gpu", "--pull-secret", "registry", "--workers", "8"),
    *("--toleration", "nvidia.com/gpu:NoSchedule", "--toleration", "team=lab", "--model", "oral-tumour"),
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arguments", [(), ALL_FLAGS])
def test_manifests_are_valid(version: str, arguments: tuple[str, ...]) -> None:
    """By the schemas of these versions of Kubernetes; the operator's own resource holds two pods of theirs."""
    cluster, job = manifests(*arguments)
    kubernetes_validate.validate(job, version, strict=True)
    for name, pod in pods(cluster, job).items():
        kind = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
        kubernetes_validate.validate(kind, version, strict=True)


def test_the_schemas_would_find_a_mistake() -> None:
    _, job = manifests()
    job["spec"]["backoffLimits"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


def test_pods_keep_to_the_restricted_security_standard() -> None:
    for pod in pods(*manifests()).values():
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == closed


def test_workers_go_where_they_are_told_to() -> None:
    cluster, job = manifests(*ALL_FLAGS)
    worker = cluster["spec"]["worker"]["spec"]
    assert worker["nodeSelector"] == {"pool": "gpu"}
    assert worker["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "lab"},
    ]
    for name, pod in pods(cluster, job).items():
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert ("nodeSelector" in pod) == ("tolerations" in pod) == (name == "worker")


def test_a_wrong_argument_is_not_tried_again_and_a_lost_scheduler_is() -> None:
    _, job = manifests()
    assert job["spec"]["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "explain", "operator": "In", "values": [2]}},
    ]
    assert job["spec"]["backoffLimit"] == 6


def test_the_client_waits_for_its_scheduler() -> None:
    """As it would end with 2 without one."""
    (wait,) = manifests()[1]["spec"]["template"]["spec"]["initContainers"]
    assert wait["command"][3:] == ["wsi-gradcam-scheduler", "8786"]
    port = free_port()
    command = [sys.executable, *wait["command"][1:3], "127.0.0.1", str(port)]
    with subprocess.Popen(command) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        with socket.create_server(("127.0.0.1", port)):
            assert process.wait(60) == 0


def test_a_patch_goes_into_the_pods_it_names(tmp_path: Path) -> None:
    patch = {
        "worker": {
            "priorityClassName": "batch",
            "tolerations": [{"key": "more", "operator": "Exists"}],
            "containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}]}, {"name": "side", "image": "s"}],
        }
    }
    (tmp_path / "patch.yaml").write_text(yaml.safe_dump(patch), encoding="utf-8")
    plain, patched = manifests("--toleration", "x"), manifests("--toleration", "x", "--patch", f"{tmp_path}/patch.yaml")
    worker, before = patched[0]["spec"]["worker"]["spec"], plain[0]["spec"]["worker"]["spec"]
    assert worker["priorityClassName"] == "batch"
    assert [each["key"] for each in worker["tolerations"]] == ["x", "more"]
    first, side = worker["containers"]
    assert first["env"] == [*before["containers"][0]["env"], {"name": "A", "value": "1"}]
    assert first["command"] == before["containers"][0]["command"]
    assert side == {"name": "side", "image": "s"}
    assert patched[1] == plain[1]


def test_pods_of_another_user(tmp_path: Path) -> None:
    """As docs/clusters.md says; the rest of the security standard stays, and schemas still hold."""
    theirs = {"runAsUser": 2000, "runAsGroup": 2000, "fsGroup": 2000}
    home = {"name": "HOME", "value": "/tmp"}
    parts = {
        name: {"securityContext": theirs, "containers": [{"name": name, "env": [home]}]}
        for name in ("scheduler", "worker", "explain")
    }
    (tmp_path / "patch.yaml").write_text(yaml.safe_dump(parts), encoding="utf-8")
    patched = manifests("--patch", f"{tmp_path}/patch.yaml")
    kubernetes_validate.validate(patched[1], VERSIONS[-1], strict=True)
    for pod in pods(*patched).values():
        assert pod["securityContext"].items() >= {**theirs, "runAsNonRoot": True}.items()
        (container,) = pod["containers"]
        assert home in container["env"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--name", "Lung_1"), "expected at most 40 small letters, digits and -, a letter first, not 'Lung_1'"),
        (("--name", "a" * 41), "expected at most 40"),
        (("--memory", "8GiB"), "expected an amount of memory such as 8Gi, not '8GiB'"),
        (("--memory", "0Gi"), "expected an amount of memory"),
        (("--cpus", "many"), "expected a number of cores"),
        (("--workers", "-3"), "expected a whole number of 1 or more, not '-3'"),
        (("--workers", "0"), "expected a whole number of 1 or more"),
        (("--toleration", "a:Never"), "expected KEY[=VALUE][:EFFECT]"),
        (("--node-selector", "gpu"), "expected LABEL=VALUE"),
        (("--patch", "nonesuch.yaml"), "nonesuch.yaml cannot be read"),
    ],
)
def test_manifests_that_cannot_be_are_refused(tmp_path: Path, wrong: tuple[str, str], told: str) -> None:
    claims = ("--image", "registry/wsi-gradcam:1", "--slides-claim", "archive", "--out-claim", "results")
    status, text, said = printed("kubernetes", tmp_path, *claims, *wrong, printing=())
    assert (status, text) == (2, "")
    assert told in " ".join(said.split())


def test_a_cluster_without_work_is_told_from_one_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By HTTP, as Dask's operator asks, which then ends it; and nothing else is answered but its health."""
    cluster, _ = manifests("--idle", "600")
    assert cluster["spec"]["idleTimeout"] == 600
    (container,) = cluster["spec"]["scheduler"]["spec"]["containers"]
    routes = next(v for v in container["env"] if v["name"].endswith("HTTP__ROUTES"))
    monkeypatch.setenv(routes["name"], routes["value"])
    port = free_port()
    file = tmp_path / "scheduler.json"
    listening = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", f"127.0.0.1:{port}"]
    with process(tmp_path, "scheduler", *listening, "--scheduler-file", str(file)):
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answers = {path: answered(port, path) for path in ("/health", "/api/v1/check_idle", "/api/v1/retire_workers")}
    assert answers["/health"] == (200, "ok")
    assert answers["/api/v1/check_idle"][0] == 200
    assert json.loads(answers["/api/v1/check_idle"][1]).keys() == {"idle_since"}
    assert answers["/api/v1/retire_workers"][0] == 404


def answered(port: int, path: str) -> tuple[int, str]:
    """Status and text that a server on this machine answers."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


# --- keys, and clusters by hand --------------------------------------------------------------------------------------


def made_key(tmp_path: Path) -> dict[str, str]:
    """The variables that the program for keys prints."""
    done = recipe("certificates", tmp_path, tmp_path / "tls")
    assert done.returncode == 0, done.stderr
    words = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(word[0] == "export" for word in words)
    return dict(word[1].split("=", 1) for word in words)


def test_a_key_is_for_its_user_alone(tmp_path: Path) -> None:
    made_key(tmp_path)
    assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "tls").iterdir()} == {
        "certificate.pem": 0o600,
        "key.pem": 0o600,
    }
    again = recipe("certificates", tmp_path, tmp_path / "tls")
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_a_cluster_with_tls_explains_and_is_closed_to_others(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by hand, as the documentation says; Dask's variables are read by each process as it starts."""
    for name, value in made_key(tmp_path).items():
        monkeypatch.setenv(name, value)
    with scheduler(tmp_path) as (_, address), process(tmp_path, *worker(address)):
        assert address.startswith("tls://")
        out = tmp_path / "out"
        command = [sys.executable, "-m", "wsi_gradcam.cli"]
        with_key = [*command, "explain", *arguments_of_explain(made, out), "--scheduler", address]
        done = subprocess.run(with_key, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        assert differing(out, made / "serial") == []
        asked = [*command, "doctor", "--scheduler", address]
        assert (
            "ok  scheduler: answers"
            in subprocess.run(asked, capture_output=True, text=True, check=False, timeout=200).stdout
        )
        for name in list(os.environ):
            if name.startswith("DASK_DISTRIBUTED__COMM"):
                monkeypatch.delenv(name)
        for tried, told in ((address, "requires a certificate, and none is set"), (f"tcp{address[3:]}", "no Dask")):
            with pytest.raises(WorkerError, match=told):
                connect(tried, 3)


def test_certificates_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    files = {f"distributed.comm.tls.{name}": str(tmp_path / "no.pem") for name in ("ca-file", "client.cert")}
    told = r"the certificates cannot be used: .*; give the files in DASK_DIST"
    with dask.config.set(files), pytest.raises(WorkerError, match=told):
        connect("tls://127.0.0.1:1", 3)


# --- what they share -------------------------------------------------------------------------------------------------

SLOW_TO_END = """\
import signal, sys, time
def end(number, frame):
    time.sleep(0.5)
    sys.exit(7)
for one in (signal.SIGINT, signal.SIGTERM):
    signal.signal(one, end)
print("ready", flush=True)
time.sleep(60)
"""
CALL = """\
import signal, sys, explaining
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs in the background ignore it
sys.executable = sys.argv[1]
sys.exit(explaining.explain([], "tcp://127.0.0.1:1"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_explain_ends_in_its_own_time(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "slow.py").write_text(SLOW_TO_END, encoding="utf-8")
    path = programs(tmp_path / "bin", python=f"exec {shlex.quote(sys.executable)} {tmp_path / 'slow.py'}\n")
    with subprocess.Popen(
        [sys.executable, "-c", CALL, path / "python"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "pipelines")},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(30) == 7
