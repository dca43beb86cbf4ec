"""Run the Python blocks of a page and put under each what it printed and drew.

A block below the comment `<!-- skipped: REASON -->` does not run, and the page says the reason.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(?:^<!-- skipped: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(text: str, name: str, pictures: Path | None = None) -> str:
    """Return the page with outputs. The blocks share their variables; an error in one names it and ends all."""
    names: dict[str, Any] = {"__name__": name}
    number = 0

    def run(block: re.Match[str]) -> str:
        nonlocal number
        number += 1
        shown = f"```python\n{block['code']}```"
        if block["reason"]:
            return f"{shown}\n\n*Not run here: {block['reason']}.*"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], f"{name}, block {number}", "exec"), names)
        if printed.getvalue():
            shown += f"\n\n```text\n{printed.getvalue().rstrip()}\n```"
        return shown + "".join(
            f"\n\n![Drawn by the block above]({path})" for path in save_figures(name, number, pictures)
        )

    return BLOCK.sub(run, text)


def save_figures(name: str, number: int, folder: Path | None) -> list[str]:
    """Save and close the open figures; return their paths as the page names them."""
    import matplotlib.pyplot as plt

    paths = []
    for figure in plt.get_fignums():
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            plt.figure(figure).savefig(folder / f"{name}-{number}-{figure}.svg", bbox_inches="tight")
            paths.append(f"{folder.name}/{name}-{number}-{figure}.svg")
    plt.close("all")
    return paths
