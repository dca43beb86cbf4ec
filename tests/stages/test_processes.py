"""Ranks that a stage starts end with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.conftest import ROOT


def execute(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run the code as a program that can start itself again."""
    program = folder / "program.py"
    program.write_text(f"import os, time\nfrom pathlib import Path\n{code}")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, program], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_ranks_may_exit_after_the_work_and_a_slow_one_is_killed(tmp_path: Path) -> None:
    """Rank 1 leaves by itself, rank 2 would stay."""
    done = execute(
        tmp_path,
        """
if "RANK" in os.environ:
    Path(os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "2":
        time.sleep(600)
    raise SystemExit
from stages.runtime import processes
with processes.started_ranks(2) as ranks:
    while not (Path("1").exists() and Path("2").exists()):
        time.sleep(0.01)
    ranks[0].wait()
    processes.EXIT_TIMEOUT = 0.1
print([rank.returncode for rank in ranks])
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, -9]\n", "")
    assert not psutil.pid_exists(int((tmp_path / "2").read_text()))
