"""Print Kubernetes manifests: a cluster for Dask's operator, and a job that runs `wsi-gradcam explain`.

    python pipelines/kubernetes.py --image registry/wsi-gradcam:0.1.0 --workers 8 --gpus 1 \\
        --slides-claim archive --out-claim results --model oral-tumour --target tumour --device cuda > run.yaml
    kubectl apply -f run.yaml && kubectl logs -f job/wsi-gradcam-explain

The image is built from the Dockerfile. Arguments that --help does not list are passed to `explain`; slides are at
/slides and results at /out, from two volume claims that many pods can mount (ReadWriteMany for /out). Printing needs
nothing. For Kubernetes 1.29 and newer, and namespaces that enforce the restricted security standard. The scheduler and
the workers answer only those who have the key in a secret (NAME-tls), which is made once:

    python pipelines/certificates.py tls && kubectl create secret generic wsi-gradcam-tls --from-file tls

The operator, once per cluster:

    helm install --repo https://helm.dask.org -n dask-operator --create-namespace operator dask-kubernetes-operator
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

import certificates

TLS = Path("/tls")  # where pods find the key
# All that HTTP answers, because it has no password: whether the scheduler is healthy, and whether it has work.
ANSWERED = "['distributed.http.health', 'wsi_gradcam.executors.dask.plugins']"
QUEUE_S = "86400"  # how long nodes may be missing
PORT = 8786
USER = 1000  # the image's
PARTS = ("scheduler", "worker", "explain")
# Without a scheduler, `explain` would end with 2, as for a wrong argument.
WAIT = """\
import socket, sys, time
while True:
    try:
        sys.exit(socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close())
    except OSError:
        time.sleep(2)
"""


def main() -> int:
    """Print the manifests."""
    given, explain = parsed()
    print(yaml.dump_all([cluster(given), job(given, explain)], Dumper=Plain, sort_keys=False), end="")
    return 0


class Plain(yaml.SafeDumper):
    """A YAML dumper that writes values that are used twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: manifests have no anchors."""
        return True


def matching(pattern: str, wanted: str) -> Any:
    """Return an argument type: text that a pattern matches in full."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"expected {wanted}, not {text!r}")
        return text

    return check


NAME = matching(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "at most 40 small letters, digits and -, a letter first")
QUANTITY = matching(r"(?!0+(\.0*)?\D*$)\d+(\.\d+)?([KMGTkmgt]i|[kMGT])", "an amount of memory such as 8Gi")
CORES = matching(r"(?!0+(\.0*)?m?$)(\d+(\.\d+)?|\d+m)", "a number of cores such as 4 or 500m")
COUNT = matching(r"[1-9]\d*", "a whole number of 1 or more")
SELECTOR = matching(r"[\w./-]+=[\w.-]*", "LABEL=VALUE")
TOLERATION = matching(r"[\w./-]+(=[\w.-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?", "KEY[=VALUE][:EFFECT]")


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this program, and those of `explain`."""
    parser = argparse.ArgumentParser(description="Print manifests for Kubernetes.", allow_abbrev=False)
    add = parser.add_argument
    add("--image", required=True, help="image built from the Dockerfile, in a registry that the nodes can reach")
    add("--slides-claim", required=True, type=NAME, help="PersistentVolumeClaim of the slides, mounted at /slides")
    add("--out-claim", required=True, type=NAME, help="PersistentVolumeClaim of the results, mounted at /out")
    add("--name", type=NAME, default="wsi-gradcam", help="name of everything that is created (default wsi-gradcam)")
    add("--workers", type=COUNT, default="2", help="pods, one worker each (default 2)")
    add("--gpus", type=int, choices=(0, 1), default=0, help="NVIDIA GPUs per worker (default 0)")
    add("--cpus", type=CORES, default="4", help="cores per worker (default 4)")
    add("--memory", type=QUANTITY, default="8Gi", help="memory per worker (default 8Gi)")
    add("--idle", type=COUNT, default="1800", metavar="SECONDS", help="end a cluster without work (default 1800)")
    add("--node-selector", type=SELECTOR, action="append", default=[], help="LABEL=VALUE of the workers' nodes")
    add("--toleration", type=TOLERATION, action="append", default=[], help="KEY[=VALUE][:EFFECT] of the workers")
    add("--pull-secret", type=NAME, action="append", default=[], help="secret with which nodes pull the image")
    add(
        "--patch",
        type=patches,
        default={},
        help="YAML file with additions to the pods of scheduler, worker and explain",
    )
    return parser.parse_known_args()


def patches(path: str) -> dict[str, Any]:
    """Return what a file adds to pods: parts of a PodSpec under `scheduler`, `worker` and `explain`."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or not found.keys() <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{path}: expected keys {', '.join(PARTS)}, with a PodSpec each")
    return found


def merged(value: Any, more: Any) -> Any:
    """Return two values merged: mappings by keys, containers by their names, other lists one after another."""
    if isinstance(value, dict) and isinstance(more, dict):
        return {**value, **{key: merged(value[key], part) if key in value else part for key, part in more.items()}}
    if isinstance(value, list) and isinstance(more, list):
        named = {item["name"]: item for item in more if isinstance(item, dict) and "name" in item}
        known = [merged(item, named.pop(item.get("name"), {})) if isinstance(item, dict) else item for item in value]
        return [*known, *(item for item in more if not isinstance(item, dict) or item.get("name", "") in ("", *named))]
    return more


def cluster(given: argparse.Namespace) -> dict[str, Any]:
    """The DaskCluster, from which the operator makes pods.

    There are two threads per worker: one has patches read for the other; with a GPU there are seven, four of which
    serve it.
    """
    # No memory limit by Dask: a paused worker would wait for ever, because torch never returns memory. The pod's
    # applies.
    command = [
        "dask",
        "worker",
        "--name",
        "$(DASK_WORKER_NAME)",
        "--nthreads",
        "7" if given.gpus else "2",
        "--memory-limit",
        "0",
        "--no-dashboard",
        address(given),  # the operator's own variable has tcp://
    ]
    limits = {"cpu": given.cpus, "memory": given.memory}
    if given.gpus:
        command, limits = [*command, "--resources", "GPU=1,CPU=3"], {**limits, "nvidia.com/gpu": str(given.gpus)}
    small = {"cpu": "1", "memory": "2Gi"}
    scheduler = container(
        given, "scheduler", small, command=["dask", "scheduler", "--host", "0.0.0.0", "--protocol", "tls"]
    )
    scheduler["env"] = [*scheduler["env"], {"name": "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES", "value": ANSWERED}]
    ports = {"tcp-comm": PORT, "http-dashboard": 8787}
    scheduler["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    health = {"httpGet": {"port": "http-dashboard", "path": "/health"}}
    scheduler["readinessProbe"] = health | {"periodSeconds": 5}
    scheduler["livenessProbe"] = health | {"periodSeconds": 30, "failureThreshold": 10}
    labels = {"dask.org/cluster-name": given.name, "dask.org/component": "scheduler"}
    service = [{"name": n, "protocol": "TCP", "port": port, "targetPort": n} for n, port in ports.items()]
    made = pod(given, container(given, "worker", limits, command=command), placed(given))
    worker = {"replicas": int(given.workers), "spec": made}
    spec = {"spec": pod(given, scheduler), "service": {"type": "ClusterIP", "selector": labels, "ports": service}}
    parts = {"idleTimeout": int(given.idle), "worker": worker, "scheduler": spec}
    return head("kubernetes.dask.org/v1", "DaskCluster", given.name) | {"spec": parts}


def placed(given: argparse.Namespace) -> dict[str, Any]:
    """The constraints on the nodes to which workers may go."""
    tolerations = []
    for text in given.toleration:
        rest, _, effect = text.partition(":")
        key, equal, value = rest.partition("=")
        wanted = {"operator": "Equal", "value": value} if equal else {"operator": "Exists"}
        tolerations.append({"key": key, **wanted, **({"effect": effect} if effect else {})})
    selector = dict(text.split("=", 1) for text in given.node_selector)
    return {key: part for key, part in (("nodeSelector", selector), ("tolerations", tolerations)) if part}


def job(given: argparse.Namespace, explain: list[str]) -> dict[str, Any]:
    """The client. It waits for the scheduler, so that 2 means a wrong argument, which is not tried again.

    After 1, as when the scheduler was lost, it is: slides that are finished or have failed are not explained again, so
    little is lost if nothing more could be done. Pods that Kubernetes ends, as when a node is drained, do not count.
    """
    where = ["--out", "/out", "--scheduler", address(given)]
    args = ["explain", "/slides", "--wait-for-workers", QUEUE_S, *explain, *where]
    small = {"cpu": "1", "memory": "2Gi"}
    wait = ["python", "-c", WAIT, f"{given.name}-scheduler", str(PORT)]
    first = container(given, "wait", {"cpu": "1", "memory": "256Mi"}, command=wait)
    template = {
        "spec": {
            "restartPolicy": "Never",
            **pod(given, container(given, "explain", small, args=args), {"initContainers": [first]}),
        }
    }
    drained = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    wrong = {"action": "FailJob", "onExitCodes": {"containerName": "explain", "operator": "In", "values": [2]}}
    spec = {"backoffLimit": 6, "podFailurePolicy": {"rules": [drained, wrong]}, "template": template}
    return head("batch/v1", "Job", f"{given.name}-explain") | {"spec": spec}


def address(given: argparse.Namespace) -> str:
    """Return the scheduler's address, which is that of its service."""
    return f"tls://{given.name}-scheduler:{PORT}"


def head(version: str, kind: str, name: str) -> dict[str, Any]:
    """Return the beginning of a manifest."""
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}


def container(given: argparse.Namespace, name: str, limits: dict[str, str], **run: list[str]) -> dict[str, Any]:
    """A container of the image that sees slides and results."""
    mounts = [{"name": "slides", "mountPath": "/slides", "readOnly": True}, {"name": "out", "mountPath": "/out"}]
    mounts.append({"name": "tls", "mountPath": str(TLS), "readOnly": True})
    env = [{"name": key, "value": value} for key, value in certificates.variables(TLS).items()]
    made = {"name": name, "image": given.image, **run, "env": env, "securityContext": CLOSED}
    return made | {"resources": {"limits": limits}, "volumeMounts": mounts}


CLOSED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}  # what "restricted" namespaces require


def pod(given: argparse.Namespace, inside: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A pod with the shared volumes, whose files the image's user may write."""
    slides = {"claimName": given.slides_claim, "readOnly": True}
    volumes: list[dict[str, Any]] = [
        {"name": "slides", "persistentVolumeClaim": slides},
        {"name": "out", "persistentVolumeClaim": {"claimName": given.out_claim}},
        {"name": "tls", "secret": {"secretName": f"{given.name}-tls", "defaultMode": 0o440}},
    ]
    # Without OnRootMismatch, each pod would go through all files of an archive, which may take hours.
    user = {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"}
    made = {"containers": [inside], "volumes": volumes, **(more or {})}
    made["securityContext"] = user | {"seccompProfile": {"type": "RuntimeDefault"}}
    if given.pull_secret:
        made["imagePullSecrets"] = [{"name": name} for name in given.pull_secret]
    patched: dict[str, Any] = merged(made, given.patch.get(inside["name"], {}))
    return patched


if __name__ == "__main__":
    raise SystemExit(main())
