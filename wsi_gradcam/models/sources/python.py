"""Networks that Python code builds: `module:function`, `timm:NAME` and `torchvision:NAME`.

A `function` takes no arguments and returns a `torch.nn.Module`. timm's and torchvision's networks have their published
weights unless the specification names others.

A function runs the code of its module.

Models are distinguished by a digest of that source code: of its module and of what it imports from the same project.
The code is located without importing anything, so that a digest can be compared before it runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from wsi_gradcam.errors import ModelError, did_you_mean, from_extra, one_line
from wsi_gradcam.io.urls import allowed_hosts, refusal
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.spec import BUNDLED, FORMS
from wsi_gradcam.system.processes import module_file, searching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wsi_gradcam.models.spec import ModelSpec


def code_digest(module: str, file: str | None) -> str:
    """Return the sha256 of a module's file and of those it imports from its own package or folder.

    It is read from the files, not from what happens to be loaded: every process must get the same.
    """
    files = project_files(module, file)
    if len(files) < 2:
        return "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    digest = hashlib.sha256()
    for path, name in sorted(files.items(), key=lambda item: item[1]):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def project_files(module: str, file: str | None) -> dict[Path, str]:
    """Return a module's file and those it imports from its own package or folder, with the modules' names."""
    if file is None:
        return {}
    parts = module.split(".")
    start = Path(file)
    depth = len(parts) - (start.name != "__init__.py")
    root = start.parents[depth] if depth < len(start.parents) else start.parent
    files = {start: module}
    waiting = [start]
    while waiting:
        path = waiting.pop()
        for name in _imported(path, files[path]):
            found = _file_of(root, name)
            if found is not None and found not in files and _belongs(name, parts, root):
                files[found] = name
                waiting.append(found)
    return files


def _belongs(name: str, parts: list[str], root: Path) -> bool:
    """Return whether a module belongs to the same project: the same package, or beside a module that is in none."""
    if len(parts) > 1:
        return name.split(".")[0] == parts[0]
    return root.name not in ("site-packages", "dist-packages")


def _file_of(root: Path, name: str) -> Path | None:
    stem = root.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _imported(path: Path, module: str) -> Iterator[str]:
    """Yield the modules that a file may import: for `from a import b`, both `a` and `a.b`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # compiled, for another Python, or nested too deep
        return
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def source_digest(spec: ModelSpec) -> str:
    """Return the digest of a function's code, without importing anything.

    Raises:
        ModelError: there is no such code.
    """
    module, _ = _names(spec.source)
    with searching(_folders(spec)):
        file = _locate(spec, module)
    if file is None:
        raise ModelError(f"{spec.source}: {module!r} has no file of its own to compare digests of")
    return code_digest(module, file)


def build_function(spec: ModelSpec) -> Built:
    """Call `module:function`; the module may lie beside the model file and in the current folder.

    Those are searched last, so that nothing there replaces an installed module; for the functions that come with the
    package, they are not searched at all.

    Raises:
        ModelError: there is no such function, it fails, or it returns no network.
    """
    source = spec.source
    module_name, function_name = _names(source)
    with searching(() if source in BUNDLED else _folders(spec)):
        file = _locate(spec, module_name)
        try:
            python = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # the module's own code may raise anything
            raise ModelError(
                f"{source}: cannot import {module_name!r} ({one_line(error)}); expected an importable "
                f"module:function (install it, or put it beside the model file), or one of {FORMS}"
            ) from error
        _check_origins(source, project_files(module_name, file))
        function = getattr(python, function_name, None)
        if not callable(function):
            raise ModelError(f"{source}: {module_name!r} has no function {function_name!r}")
        network = _call(source, function)
        _check_origins(source, project_files(module_name, file))
    return Built(network, code_digest=code_digest(module_name, python.__file__))


def _names(source: str) -> tuple[str, str]:
    """Return the module and function of a source; refuse invalid ones, and modules that do not build networks."""
    module, _, function = source.partition(":")
    if not all(name.isidentifier() for name in (*module.split("."), function)):
        raise ModelError(f"{source}: expected module:function, or one of {FORMS}")
    if source not in BUNDLED and _of_a_program(module):
        raise ModelError(
            f"{source}: {module.partition('.')[0]} does not build networks; expected a function that returns a "
            f"torch.nn.Module, or one of {FORMS}"
        )
    return module, function


def _of_a_program(module: str) -> bool:
    """Return whether a module belongs to Python, the running program or this package: none of these makes networks."""
    return module.partition(".")[0] in {*sys.stdlib_module_names, "__main__", "wsi_gradcam"}


def _call(source: str, function: Callable[[], Any]) -> nn.Module:
    """Return the network that a function makes; refuse uncalled one that cannot, such as a program's main."""
    name = source.partition(":")[2]
    promised = getattr(function, "__annotations__", {}).get("return", nn.Module)
    plain = promised in (None, int, str, bool, float, "None", "int", "str", "bool", "float")
    if plain or (inspect.isroutine(function) and _of_a_program(function.__module__ or "") and source not in BUNDLED):
        raise ModelError(
            f"{source}: {name}() does not return a network; expected a function that returns a torch.nn.Module"
        )
    stdin, sys.stdin = sys.stdin, io.StringIO()  # code that asks the user something would wait for ever
    try:
        network = function()
    except (Exception, SystemExit) as error:  # as above
        raise ModelError(f"{source}: {name}() fails: {one_line(error)}") from error
    finally:
        sys.stdin = stdin
    if not isinstance(network, nn.Module):
        raise ModelError(f"{source}: returned a {type(network).__name__}, expected a torch.nn.Module")
    return network


def _folders(spec: ModelSpec) -> tuple[Path, ...]:
    return spec.folder, Path()


def _locate(spec: ModelSpec, module: str) -> str | None:
    """Return the file that `import module` would run, without running anything; None if there is none.

    Raises:
        ModelError: another module with that name is beside the model file, and would silently not be used.
    """
    file = module_file(module)
    beside = _file_of(spec.folder, module)
    if beside is not None and (file is None or not beside.samefile(file)) and spec.source not in BUNDLED:
        raise ModelError(_shadowed(spec.source, beside, file))
    return file


def _check_origins(source: str, files: dict[Path, str]) -> None:
    """Refuse other modules with the same names: Python imports a name once, and would silently return the first."""
    for path, name in files.items():
        python = sys.modules.get(name)
        if python is not None and (python.__file__ is None or not path.samefile(python.__file__)):
            raise ModelError(_shadowed(source, path, python.__file__))


def _shadowed(source: str, meant: Path, found: str | None) -> str:
    return (
        f"{source}: {meant} is meant, but Python imports {found}, which has the same name: installed modules come "
        "first; rename one of them, or use a separate process for each model"
    )


def build_timm(spec: ModelSpec) -> Built:
    """Build a model of timm, with as many outputs as the specification has classes.

    Raises:
        ModelError: timm has no such model, or its published weights are not available.
    """
    with from_extra("timm", spec.source):
        import timm

    name = spec.argument
    if not timm.is_model(name.split(".")[0]):
        near = did_you_mean(name, timm.list_models()) or f"timm.list_models('*{name[:6]}*') in Python lists some"
        raise ModelError(f"timm:{name}: timm has no such model; {near}")
    if spec.weights is None and not timm.is_model_pretrained(name):
        # timm would warn in its log and continue with random weights.
        raise ModelError(
            f"timm:{name}: it has no published weights; give a file with 'weights:' in a model file, or use 'weights: "
            "random' for an untrained network"
        )
    if spec.weights is None:
        _check_network(spec, timm.get_pretrained_cfg(name))
    outputs: dict[str, Any] = {"num_classes": 0} if spec.is_encoder else {}
    if spec.weights is not None and spec.classes is not None:  # timm would put a random head on published weights
        outputs["num_classes"] = len(spec.classes)
    try:
        module = timm.create_model(name, pretrained=spec.weights is None, **outputs)
    except (OSError, RuntimeError) as error:
        raise _no_weights(spec, f"{type(error).__name__}: {error}") from error
    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]  # set by timm, not declared
    _, height, width = config["input_size"]
    return Built(module, patch_px=(height, width), mean=tuple(config["mean"]), std=tuple(config["std"]))


def _check_network(spec: ModelSpec, config: Any) -> None:
    """Refuse at once where the hub's name is not known: its client would try again for 50 s.

    Raises:
        ModelError: the weights are neither cached nor available.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    repository = getattr(config, "hf_hub_id", None)
    if any(
        repository and isinstance(try_to_load_from_cache(str(repository), file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    ):
        return
    _check_allowed(spec, constants.ENDPOINT if repository else str(getattr(config, "url", "")))
    if not repository or not host or urllib.request.getproxies():  # fetched from elsewhere, or by another way
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise _no_weights(spec, f"cannot reach {host}: {error}") from error


def _check_allowed(spec: ModelSpec, url: str) -> None:
    """Raise a ModelError if weights would be downloaded from a host that is not allowed."""
    if allowed_hosts() and url and (why := refusal(url)):
        raise _no_weights(spec, why)


def _no_weights(spec: ModelSpec, cause: str) -> ModelError:
    return ModelError(
        f"{spec.source}: the published weights are not available ({cause}); give a file with 'weights:' in a model "
        "file, or use 'weights: random' for an untrained network"
    )


def build_torchvision(spec: ModelSpec) -> Built:
    """Build a model of torchvision, with as many outputs as the specification has classes.

    Raises:
        ModelError: torchvision has no such classifier, or its published weights are not available.
    """
    from torch.hub import get_dir

    with from_extra("timm", spec.source):
        from torchvision.models import get_model, get_model_weights, list_models

    name = spec.argument
    try:
        published = get_model_weights(name).DEFAULT
    except ValueError as error:
        near = did_you_mean(name, list_models()) or "see torchvision.models"
        raise ModelError(f"torchvision:{name}: torchvision has no such model; {near}") from error
    transform = published.transforms()
    if not hasattr(transform, "crop_size"):
        raise ModelError(f"torchvision:{name}: not an image classifier, expected one such as torchvision:resnet18")
    arguments: dict[str, Any] = {"weights": published if spec.weights is None else None}
    if spec.weights is not None and spec.classes is not None:
        arguments["num_classes"] = len(spec.classes)
    if spec.weights is None and not (Path(get_dir()) / "checkpoints" / Path(published.url).name).is_file():
        _check_allowed(spec, published.url)
    try:
        module = get_model(name, **arguments)
    except (OSError, RuntimeError) as error:
        raise _no_weights(spec, f"{type(error).__name__}: {error}") from error
    side = transform.crop_size[0]
    classes = tuple(published.meta["categories"]) if spec.classes is None else None
    mean, std = tuple(transform.mean), tuple(transform.std)
    return Built(module, classes, patch_px=(side, side), mean=mean, std=std)


HEADS = ("fc", "classifier", "heads", "head")  # for torchvision's networks


def without_head(built: Built, spec: ModelSpec) -> Built:
    """Return the network that returns the inputs of a library classifier's last linear layer: features.

    A network from elsewhere stays as it is, and returns features itself.

    Raises:
        ModelError: its last layer cannot be removed.
    """
    module = built.module
    if spec.kind in ("timm", "hf"):
        module.reset_classifier(0)  # type: ignore[operator]  # of timm's networks
    elif spec.kind == "torchvision":
        _leave_off(spec, module)
    return replace(built, classes=None)


def _leave_off(spec: ModelSpec, module: nn.Module) -> None:
    from torch import nn

    for name in HEADS:
        head = getattr(module, name, None)
        if isinstance(head, nn.Linear):
            setattr(module, name, nn.Identity())
            return
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            head[-1] = nn.Identity()
            return
    raise ModelError(
        f"{spec.source}: does not end in a linear layer, so its features are not known; write a function that returns "
        "a network that does"
    )
