"""A small pipeline: a copy of the repository with little data, tiny models and few steps, and its outputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from stages.runtime.inputs import files_under
from tests.conftest import ROOT

STEPS = 30
CHANGES: dict[str, dict[str, Any]] = {
    "model": {"context_length": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16}
    | {"ffn_dim": 64},
    "pretrain": {"max_steps": STEPS, "batch_size": 4, "eval_interval": 10, "sample_tokens": 4, "eval_tokens": 1000},
    "finetune_classify": {"max_steps": STEPS, "batch_size": 8, "eval_interval": 10, "scratch_control": True},
    "finetune_instruct": {"max_steps": STEPS, "batch_size": 4, "eval_interval": 10, "scratch_control": True},
    "evaluate": {"test_tokens": 1000, "max_new_tokens": 4, "report_samples": 3},
    "runtime": {"device": "cpu", "compile": False, "workers": 1, "checkpoint_interval": 1},
}


def tiny_copy(folder: Path) -> Path:
    """Copy the repository to `folder` without results, with one in `n` of the sample's entries and CHANGES."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if name != "dvc.lock" and not name.startswith("reports/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    slices = {"stories.txt": ("\n\n\n", 25), "messages.jsonl": ("\n", 35), "instructions.jsonl": ("\n", 45)}
    slices["conversations.jsonl"] = ("\n", 100)
    for name, (separator, n) in slices.items():
        path = folder / "data/sample" / name
        entries = path.read_text(encoding="utf-8").strip("\n").split(separator)
        path.write_text(separator.join(entries[::n]) + "\n", encoding="utf-8", newline="\n")
    change_params(folder, CHANGES)
    values = read_params(folder)
    values["tokenize"]["tokenizer"]["vocab_size"] = 400
    values["tokenize"]["tokens_per_shard"] = 5000
    values["tokenize"]["max_too_long"] = 1.0
    values["training"]["precision"] = "fp32"  # on any machine: two ranks then differ from one by rounding of fp32 alone
    write_params(folder, values)
    execute(folder, "git", "init", "-q")
    return folder


def read_params(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))


def write_params(folder: Path, values: dict[str, Any]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def change_params(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    values = read_params(folder)
    for section, change in changes.items():
        assert change.keys() <= values[section].keys() | values["training"].keys()
        values[section] |= change
    write_params(folder, values)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    person = {f"GIT_{role}_{key}": "tester@localhost" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # dvc, and the python of the stages
    return kept | person | {"PATH": path, "OMP_NUM_THREADS": "1", "LLM_TRACKING": "off", "PYTHONPATH": ""}


def execute(folder: Path, *command: str) -> str:
    """Run a command that has to succeed; return its stdout, then stderr."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def dvc_stages(folder: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def outputs(folder: Path, *stages: str) -> list[Path]:
    """Return the outputs of these stages in `dvc.yaml`, of all stages if none is named."""
    found: list[Path] = []
    for name, stage in dvc_stages(folder).items():
        for kind in ("outs", "metrics", "plots"):
            if not stages or name in stages:
                found += [folder / (out if isinstance(out, str) else next(iter(out))) for out in stage.get(kind, [])]
    return found


def contents(paths: list[Path]) -> dict[Path, bytes]:
    return {file: file.read_bytes() for path in paths for file in files_under(path)}
