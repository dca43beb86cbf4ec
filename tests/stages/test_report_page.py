"""Page of the report for MLflow."""

from __future__ import annotations

import base64
from pathlib import Path

from stages.tracking.report import html_report


def test_page_holds_its_pictures_and_no_foreign_markup(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/loss.png").write_bytes(b"pixels")
    (tmp_path.parent / "secret.png").write_bytes(b"secret")
    (tmp_path / "report.md").write_text(
        "# Report\n\n![Loss](figures/loss.png) ![gone](figures/gone.png) ![out](../secret.png)\n\n"
        "| a | b |\n|---|---:|\n| 1 | 2 |\n\n<script>alert(1)</script>\n"
    )
    page = html_report(tmp_path / "report.md")
    assert f'src="data:image/png;base64,{base64.b64encode(b"pixels").decode()}"' in page
    assert base64.b64encode(b"secret").decode() not in page
    assert "<h1>Report</h1>" in page and "<td>1</td>" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
