"""Coverage-guided fuzzing of one parser: `python -m tests.fuzz gguf --seconds 60`. A crash ends it with status 77.

What it finds is kept in the folder that `--keep` names, and built upon there the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llm", "zipfile"]):
    from tests.fuzz.parsers import CORPUS, PARSERS, mutated, prepared, seeds

LARGEST = 20_000  # bytes of an input: more than any seed has, and small enough to be fast


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    arguments.add_argument("parser", choices=PARSERS)
    arguments.add_argument("--seconds", type=int, default=60, help="how long (default: %(default)s)")
    arguments.add_argument("--runs", type=int, default=-1, help="how many inputs at most")
    arguments.add_argument("--seed", type=int, default=0, help="the same search each time; 0: another one")
    arguments.add_argument("--keep", type=Path, help="a folder for the inputs that reach new code")
    chosen = arguments.parse_args()
    warnings.simplefilter("ignore")  # numpy's, of numbers that overflow
    parser = PARSERS[chosen.parser]()
    with tempfile.TemporaryDirectory() as name, prepared(parser) as execute:
        found = chosen.keep or Path(name, "found")
        first = Path(name, "seeds")
        for folder in (found, first, CORPUS / chosen.parser):
            folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds(parser)):
            (first / str(number)).write_bytes(seed)

        def run(data: bytes) -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                execute(data)

        def mutate(data: bytes, largest: int, seed: int) -> bytes:
            """Half of the time as libFuzzer does it, half by words, so that what was JSON often still is."""
            if seed % 2:
                return bytes(atheris.Mutate(data, largest))
            return mutated(data, random.Random(seed))[:largest]

        options = {
            "max_total_time": chosen.seconds,
            "runs": chosen.runs,
            "seed": chosen.seed,
            "max_len": LARGEST,
            "timeout": 120,  # seconds that one input may take, on a machine that is busy
            "rss_limit_mb": 4096,
            "artifact_prefix": f"{tempfile.gettempdir()}/{chosen.parser}-",  # where an input that crashes is left
            "print_final_stats": 1,
        }
        folders = [str(folder) for folder in (found, first, CORPUS / chosen.parser)]
        flags = [f"-{key}={value}" for key, value in options.items()]
        atheris.Setup([sys.argv[0], *folders, *flags], run, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
