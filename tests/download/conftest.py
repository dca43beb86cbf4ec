from __future__ import annotations

from pathlib import Path

import pytest

from tests.download.sources import Place


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
