"""Saved states of a training: exact, whole or not at all, and passed over where they are damaged."""

from __future__ import annotations

import logging
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.common.files import replaced_folder
from llm.training.state import load_state, save_state


def state(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        "model.weight": torch.full((3, 2), step / 7),
        "optimizer.0.0.step": torch.tensor(float(step)),
        "random.cpu": torch.arange(16, dtype=torch.uint8) + step,
    }
    values = {"step": step, "best_loss": float("inf"), "history": [{"step": 0.0, "val/loss": 0.1 + 0.2}], "losses": []}
    return tensors, values


def load(folder: Path) -> tuple[Any, list[str]]:
    """Return the newest sound state and the warnings of the damaged ones."""
    said: list[str] = []
    with unittest.mock.patch.object(
        logging.getLogger("llm"), "warning", lambda message, *values: said.append(message % values)
    ):
        return load_state(folder), said


def test_a_state_reads_back_exactly_and_two_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "of" / "this" / "training"
    assert load(folder) == (None, [])
    for step in (7, 20, 100):
        save_state(folder, step, *state(step))
        loaded, said = load(folder)
        assert loaded is not None and not said
        tensors, values = state(step)
        assert loaded[1] == values
        assert loaded[0].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[0][name].dtype == tensor.dtype and torch.equal(loaded[0][name], tensor)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000100"]


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit of a tensor": lambda path: flip_bit(path / "state.safetensors", -3),
    "tensors cut": lambda path: (path / "state.safetensors").write_bytes(b"\x10\x00"),
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "values cut": lambda path: (path / "state.json").write_text('{"sha256": "ab'),
    "values changed": lambda path: (path / "state.json").write_text(
        (path / "state.json").read_text().replace('"best_loss": Inf', '"best_loss": -Inf')
    ),
    "values of another kind": lambda path: (path / "state.json").write_text("[]"),
    "values in too many brackets": lambda path: (path / "state.json").write_text("[" * 5000),
    "values empty": lambda path: (path / "state.json").write_text("{}"),
    "no values": lambda path: (path / "state.json").unlink(),
    "values binary": lambda path: (path / "state.json").write_bytes(b"\xff\xff\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    for step in (10, 20):
        save_state(tmp_path, step, *state(step))
    damage(tmp_path / "step-00000020")
    loaded, said = load(tmp_path)
    assert loaded is not None and loaded[1]["step"] == 10
    assert len(said) == 1 and said[0].startswith(f"{tmp_path}/step-00000020: damaged training state, passed over")
    assert "\n" not in said[0]
    damage(tmp_path / "step-00000010")
    loaded, said = load(tmp_path)
    assert loaded is None and len(said) == 2


def test_after_damage_the_states_that_are_written_again_stay(tmp_path: Path) -> None:
    """A training that went back to an early step must not lose what it saves there to later, damaged states."""
    for step in (300, 400):
        save_state(tmp_path, step, *state(step))
        flip_bit(tmp_path / f"step-{step:08d}" / "state.safetensors", -3)
    assert load(tmp_path)[0] is None
    for step in (50, 100):
        save_state(tmp_path, step, *state(step))
        loaded, said = load(tmp_path)
        assert loaded is not None and loaded[1]["step"] == step and not said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000050", "step-00000100"]


def test_a_state_that_was_only_half_written_does_not_count(tmp_path: Path) -> None:
    save_state(tmp_path, 10, *state(10))
    with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "step-00000020") as new:
        (new / "state.json").write_text("{")
        raise KeyboardInterrupt
    (tmp_path / "step-00000030.partial").mkdir()  # what SIGKILL leaves
    loaded, said = load(tmp_path)
    assert loaded is not None and loaded[1]["step"] == 10 and not said
