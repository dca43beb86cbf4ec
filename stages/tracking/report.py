"""Page of the report: one HTML file with its pictures inside, as MLflow shows no Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #1c2024; }
table { border-collapse: collapse; margin: 1em 0; } th, td { border: 1px solid #d5dae0; padding: .3em .7em; }
img { max-width: 100%; } pre { background: #f4f6f8; padding: .8em; overflow: auto; white-space: pre-wrap; }
"""


def html_report(path: Path) -> str:
    """Return a Markdown file as an HTML page. Pictures beside it are inside, and HTML in it is text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(path.read_text(encoding="utf-8"))
    embed_pictures(tokens, path.parent)
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def embed_pictures(tokens: Sequence[Token], folder: Path) -> None:
    """Replace the addresses of PNG files in the folder by their content."""
    for token in tokens:
        embed_pictures(token.children or [], folder)
        picture = folder / str(token.attrGet("src") or "") if token.type == "image" else folder
        if picture.suffix == ".png" and picture.is_file() and picture.resolve().is_relative_to(folder.resolve()):
            content = base64.b64encode(picture.read_bytes()).decode()
            token.attrSet("src", f"data:image/png;base64,{content}")
