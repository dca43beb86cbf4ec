"""The parsers of untrusted bytes on what fuzzing has found, and on a few hundred inputs more that are new to them.

The search itself, guided by coverage: `python -m tests.fuzz PARSER`.
"""

from __future__ import annotations

import random
import warnings

import pytest

from tests.fuzz.parsers import PARSERS, kept, mutated, prepared, seeds

MUTATED = 300


@pytest.mark.parametrize("name", PARSERS)
def test_no_input_is_more_than_refused(name: str) -> None:
    parser = PARSERS[name]()
    sound = seeds(parser)
    chooser = random.Random(name)
    inputs = [b"", *(path.read_bytes() for path in kept(name))]
    inputs += [mutated(chooser.choice(sound), chooser) for _ in range(MUTATED)]
    with prepared(parser) as execute, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of numbers that overflow
        assert all(map(execute, sound)), "what mutation begins with is no longer taken"
        for data in inputs:
            try:
                execute(data)
            except Exception as error:
                raise AssertionError(f"{name}: {error!r} with the input {data[:2000]!r}") from error
