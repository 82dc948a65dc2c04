"""Print Kubernetes manifests: a cluster for Dask's operator, and a job that runs `wsi-gradcam explain`.

    python pipelines/kubernetes.py --image registry/wsi-gradcam:0.1.0 --workers 8 --gpus 1 \\
        --slides-claim archive --out-claim results --model oral-tumour --target tumour --device cuda > run.yaml
    kubectl apply -f run.yaml && kubectl logs -f job/wsi-gradcam-explain

The image is made by the Dockerfile. What --help does not list are arguments of `explain`; slides are at /slides and
results at /out, from two volume claims that many pods can mount (ReadWriteMany for /out). Nothing is needed to print.
Scheduler and workers answer those alone that have the key of a secret (NAME-tls), made once:

    python pipelines/certificates.py tls && kubectl create secret generic wsi-gradcam-tls --from-file tls

The operator, once a cluster:

    helm install --repo https://helm.dask.org -n dask-operator --create-namespace operator dask-kubernetes-operator
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

import certificates

TLS = Path("/tls")  # where pods see the key
HEALTH = "['distributed.http.health']"  # all that HTTP answers: it has no password
QUEUE_S = "86400"  # how long nodes may be missing


def main() -> int:
    """Print the manifests."""
    given, explain = parsed()
    print(yaml.safe_dump_all([cluster(given), job(given, explain)], sort_keys=False), end="")
    return 0


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this program, and those of `explain`."""
    parser = argparse.ArgumentParser(description="Print manifests for Kubernetes.", allow_abbrev=False)
    parser.add_argument("--image", required=True, help="made by the Dockerfile, in a registry that the nodes reach")
    parser.add_argument("--slides-claim", required=True, help="PersistentVolumeClaim of the slides, seen at /slides")
    parser.add_argument("--out-claim", required=True, help="PersistentVolumeClaim of the results, seen at /out")
    parser.add_argument("--name", default="wsi-gradcam", help="of all that is made (default wsi-gradcam)")
    parser.add_argument("--workers", type=int, default=2, help="pods, one worker each (default 2)")
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0, help="NVIDIA GPUs of a worker (default 0)")
    parser.add_argument("--cpus", default="4", help="cores of a worker (default 4)")
    parser.add_argument("--memory", default="8Gi", help="memory of a worker (default 8Gi)")
    return parser.parse_known_args()


def cluster(given: argparse.Namespace) -> dict[str, Any]:
    """The DaskCluster, of which the operator makes pods.

    Two threads a worker: one has patches read for the other. Five beside a GPU, of which two are for it.
    """
    # No memory limit of Dask's: a worker it pauses waits for ever, as torch never gives memory back. The pod's holds.
    command = [
        "dask",
        "worker",
        "--name",
        "$(DASK_WORKER_NAME)",
        "--nthreads",
        "5" if given.gpus else "2",
        "--memory-limit",
        "0",
        "--no-dashboard",
        address(given),  # the operator's own variable says tcp://
    ]
    limits = {"cpu": given.cpus, "memory": given.memory}
    if given.gpus:
        command, limits = [*command, "--resources", "GPU=1,CPU=3"], {**limits, "nvidia.com/gpu": str(given.gpus)}
    small = {"cpu": "1", "memory": "2Gi"}
    scheduler = container(
        given, "scheduler", small, command=["dask", "scheduler", "--host", "0.0.0.0", "--protocol", "tls"]
    )
    scheduler["env"] = [*scheduler["env"], {"name": "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES", "value": HEALTH}]
    ports = {"tcp-comm": 8786, "http-dashboard": 8787}
    scheduler["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    scheduler["readinessProbe"] = {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 5}
    labels = {"dask.org/cluster-name": given.name, "dask.org/component": "scheduler"}
    service = [{"name": n, "protocol": "TCP", "port": port, "targetPort": n} for n, port in ports.items()]
    worker = {"replicas": given.workers, "spec": pod(given, container(given, "worker", limits, command=command))}
    spec = {"spec": pod(given, scheduler), "service": {"type": "ClusterIP", "selector": labels, "ports": service}}
    return head("kubernetes.dask.org/v1", "DaskCluster", given.name) | {"spec": {"worker": worker, "scheduler": spec}}


def job(given: argparse.Namespace, explain: list[str]) -> dict[str, Any]:
    """The client. It is started again until it finds the scheduler; not when slides have failed, as slides.csv says."""
    where = ["--out", "/out", "--scheduler", address(given)]
    args = ["explain", "/slides", "--wait-for-workers", QUEUE_S, *explain, *where]
    template = pod(given, container(given, "explain", {"cpu": "1", "memory": "2Gi"}, args=args))
    failed = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1]}}
    spec = {"backoffLimit": 20, "podFailurePolicy": {"rules": [failed]}}
    template = {"spec": template | {"restartPolicy": "Never"}}
    return head("batch/v1", "Job", f"{given.name}-explain") | {"spec": {**spec, "template": template}}


def address(given: argparse.Namespace) -> str:
    """Return the scheduler's address, of its service."""
    return f"tls://{given.name}-scheduler:8786"


def head(version: str, kind: str, name: str) -> dict[str, Any]:
    """Return the beginning of a manifest."""
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}


def container(given: argparse.Namespace, name: str, limits: dict[str, str], **run: list[str]) -> dict[str, Any]:
    """A container of the image that sees slides and results."""
    mounts = [{"name": "slides", "mountPath": "/slides", "readOnly": True}, {"name": "out", "mountPath": "/out"}]
    mounts.append({"name": "tls", "mountPath": str(TLS), "readOnly": True})
    env = [{"name": key, "value": value} for key, value in certificates.variables(TLS).items()]
    made = {"name": name, "image": given.image, **run, "env": env}
    return made | {"resources": {"limits": limits}, "volumeMounts": mounts}


def pod(given: argparse.Namespace, inside: dict[str, Any]) -> dict[str, Any]:
    """A pod with the shared volumes, whose files the image's user may write."""
    claims = {"slides": given.slides_claim, "out": given.out_claim}
    volumes: list[dict[str, Any]] = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim in claims.items()
    ]
    volumes.append({"name": "tls", "secret": {"secretName": f"{given.name}-tls", "defaultMode": 0o440}})
    return {"containers": [inside], "volumes": volumes, "securityContext": {"fsGroup": 1000}}


if __name__ == "__main__":
    raise SystemExit(main())
