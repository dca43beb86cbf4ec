"""Run a stage and sample the memory of all its processes each second; `--kill-after` ends it when shards are cleaned.

    python examples/cleaning/sample_memory.py memory.csv --kill-after 40 -- python -m stages.tokenize

The resident memory includes pages of mapped files and of libraries that several processes share.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

import psutil

COLUMNS = "seconds,processes,resident_mb,own_mb,main_own_mb,worker_own_mb,processor_seconds,shards\n"


def sample(main: psutil.Process) -> tuple[int, ...]:
    """Return the number of processes, their memory in MB and their processor time.

    The memory is resident and own of all, own of the main process, own of the largest other one.
    """
    memory, seconds = {}, 0.0
    for process in (main, *main.children(recursive=True)):
        try:
            with process.oneshot():
                memory[process.pid] = process.memory_full_info()
                seconds += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    own = {pid: found.uss for pid, found in memory.items()}
    sizes = [sum(found.rss for found in memory.values()), sum(own.values()), own.pop(main.pid, 0)]
    sizes.append(max(own.values(), default=0))
    return len(memory), *(round(size / 1e6) for size in sizes), round(seconds)


def shards_done() -> int:
    return sum(path.suffix == "" for path in Path(".work/tokenize").glob("*/clean-*"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a stage and sample the memory of its processes.")
    parser.add_argument("csv", type=Path)
    parser.add_argument("--kill-after", type=int, help="cleaned shards after which the stage gets SIGKILL")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    start = time.monotonic()
    with args.csv.open("w", encoding="utf-8") as file, subprocess.Popen(args.command) as child:
        file.write(COLUMNS)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            done = shards_done()
            if args.kill_after and done >= args.kill_after:
                child.kill()
                break
            try:
                row = time.monotonic() - start, *sample(process), done
            except psutil.NoSuchProcess:
                break
            file.write(",".join(f"{value:.0f}" for value in row) + "\n")
            file.flush()
            time.sleep(1)
    print(f"exit status {child.returncode} after {time.monotonic() - start:.0f} s, {shards_done()} shards left behind")


if __name__ == "__main__":
    main()
