"""Inputs of a stage: the params and deps that `dvc.yaml` lists, with their content."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llm.common.device import device_kind, is_fast_in_bf16
from llm.common.digests import file_md5, folder_md5, path_md5
from llm.common.errors import InputError
from llm.config import Params, TrainParams, effective_params
from stages.tracking.provenance import OUTPUTS, paths


class FileState(NamedTuple):
    """A file's md5, and the stamp that spares reading it again."""

    stamp: tuple[int, int, int]  # size, modification time, inode
    md5: str


class Inputs(NamedTuple):
    params: dict[str, Any]
    deps: list[str]  # files and folders
    files: dict[str, FileState]  # each file of them


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file in the repository's root; raise `InputError` for any other content."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found in {Path.cwd()}; run from the repository's root") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError, IsADirectoryError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys with values, found {type(values).__name__}")
    return values


def read_inputs(stage: str, values: Mapping[str, Any], known: Mapping[str, FileState] | None = None) -> Inputs:
    """Read the stage's effective params and its deps; a `known` file with the same stamp is not read again."""
    stages = read_yaml(Path("dvc.yaml")).get("stages", {})
    if stage not in stages:
        raise InputError(f"dvc.yaml: no stage {stage!r}")
    effective = effective_params(values)
    params = {key: _lookup(effective, key) for key in stages[stage].get("params", [])}
    deps: list[str] = stages[stage].get("deps", [])
    files: dict[str, FileState] = {}
    for dep in deps:
        if not Path(dep).exists():
            raise InputError(f"{dep}: missing, and this stage reads it; `dvc repro {stage}` makes it first")
        for path in files_under(Path(dep)):
            files[path.as_posix()] = _file_state(path, (known or {}).get(path.as_posix()))
    return Inputs(params, deps, files)


def fingerprint(inputs: Inputs, params: Params) -> str:
    """Return the name of a training state: equal for equal inputs on the same kind of device with the same torch."""
    machine: list[str] = []
    if "torch" in sys.modules:
        machine = [importlib.metadata.version("torch"), device_kind(params.runtime.device)]
    content = [inputs.params, {path: state.md5 for path, state in inputs.files.items()}, machine]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def pre_decay_inputs(inputs: Inputs) -> Inputs | None:
    """Return the inputs of a WSD pretraining before its decay, from where a longer one continues; None for others."""
    section = inputs.params.get("pretrain")
    if section is None or section["schedule"] != "wsd":
        return None
    without_length = {key: value for key, value in section.items() if key not in ("max_steps", "decay_steps")}
    return inputs._replace(params=inputs.params | {"pretrain": without_length})


def data_digests(inputs: Inputs) -> dict[str, str]:
    """Return the md5 of each dep under `data/` and `models/`, as in `dvc.lock` without the `.dir` of a folder."""
    digests: dict[str, str] = {}
    for dep in inputs.deps:
        if dep in inputs.files:
            digests[dep] = inputs.files[dep].md5
        else:
            inside = [path for path in inputs.files if path.startswith(f"{dep}/")]
            digests[dep] = folder_md5({path.removeprefix(f"{dep}/"): inputs.files[path].md5 for path in inside})
    return {dep: digest for dep, digest in digests.items() if dep.startswith(("data/", "models/"))}


def output_digests(stage: str) -> dict[str, str]:
    """Return the md5 of each output of a stage, as `dvc.lock` will have it."""
    made = paths(read_yaml(Path("dvc.yaml"))["stages"][stage], *OUTPUTS)
    return {path: md5 for path in made if (md5 := path_md5(Path(path))) is not None}


def environment(stage: str, params: Params) -> dict[str, str]:
    """Return the machinery of a run, and for a stage that computes with torch its device, precision and processes."""
    found = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    section = getattr(params, stage.replace("-", "_"), None)
    if "torch" in sys.modules:
        found["device"] = device = device_kind(params.runtime.device)
        if isinstance(section, TrainParams):
            found["precision"] = section.resolve_precision(is_fast_in_bf16(device))
            found["processes"] = os.environ.get("WORLD_SIZE") or os.environ.get("LLM_NPROC") or "1"
    return found


def check_unchanged(before: Inputs, after: Inputs) -> None:
    """Raise `InputError` for inputs that changed meanwhile: DVC would record the later ones with the outputs."""
    old = {path: state.md5 for path, state in before.files.items()} | flatten(before.params)
    new = {path: state.md5 for path, state in after.files.items()} | flatten(after.params)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise InputError(f"{changed[0]}{more} changed while the stage ran, so its outputs do not count; run it again")


def files_under(path: Path) -> list[Path]:
    """Return the file itself, or all files of a folder in a fixed order, without Python's caches."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return `{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{inner}": v for inner, v in flatten(value, separator).items()}
        else:
            flat[key] = value
    return flat


def _lookup(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise InputError(f"params.yaml: no key {key}, which dvc.yaml lists")
        found = found[part]
    return found


def _file_state(path: Path, known: FileState | None) -> FileState:
    stat = path.stat()
    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if known is not None and known.stamp == stamp:
        return known
    return FileState(stamp, file_md5(path))
