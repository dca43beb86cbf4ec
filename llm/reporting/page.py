"""Build the report as one HTML page that asks for nothing: pictures inside, and tables that filter and sort.

The page is the Markdown report in another order, so whatever is added there stands here too: the verdict, all pictures,
then each section with its tables. The data card, the environment and the predictions follow.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from llm.common.sanitize import visible

ASSETS = Path(__file__).parent / "assets"
MOST_ROWS = 1000  # predictions of a kind
MODELS = ("", "gpt", "base", "scratch", "nearest")  # whose predictions are shown; the baselines' are in the files
Row = Mapping[str, str]


def page(report: Path, card: Path, constraints: Path, predictions: Sequence[Path]) -> str:
    """Return the page of a Markdown report, with the pictures beside it, a data card, versions and predictions.

    HTML in any of them is text. `predictions` are JSON lines files that may be shown.
    """
    title, sections = split_sections(report.read_text(encoding="utf-8"))
    verdict, *rest = [(heading, *part_pictures(tokens, report.parent)) for heading, tokens in sections]
    figures = [figure for _, _, found in (verdict, *rest) for figure in found]
    parts = [("Verdict", verdict[1])]
    parts += [("Pictures", f'<div class="figures">{"".join(figures)}</div>')] if figures else []
    parts += [(heading, body) for heading, body, _ in rest]
    if card.is_file():
        _, cards = split_sections(card.read_text(encoding="utf-8"))
        parts.append(("Data", "".join(f"<h3>{escape(h)}</h3>" * bool(h) + render(t) for h, t in cards)))
    parts.append(("Environment", environment(constraints)))
    parts += [(f"Predictions: {path.stem}", prediction_table(path)) for path in predictions if path.is_file()]
    return fill(title, parts)


def fill(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """Return the whole page; a policy in it forbids every request and every other script."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{slug(heading)}">{escape(heading)}</a>' for heading, _ in parts)
    body = "".join(
        f'<section id="{slug(heading)}"><h2>{escape(heading)}</h2>{content}</section>\n' for heading, content in parts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><nav>{links}</nav></header>\n<main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


# ---- Markdown --------------------------------------------------------------------------------------------------------


def parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def render(tokens: Sequence[Token]) -> str:
    markdown = parser()
    return str(markdown.renderer.render(tokens, markdown.options, {}))


def split_sections(text: str) -> tuple[str, list[tuple[str, list[Token]]]]:
    """Return a Markdown text's title and its sections by heading; the first, without one, stands above all others."""
    title, sections = "Report", [("", list[Token]())]
    tokens = parser().parse(text)
    places = iter(range(len(tokens)))
    for i in places:
        if tokens[i].type == "heading_open" and tokens[i].tag in ("h1", "h2"):
            heading = plain_text(tokens[i + 1])
            if tokens[i].tag == "h1":
                title = heading
            else:
                sections.append((heading, []))
            next(places), next(places)  # the heading's text and its end
        else:
            sections[-1][1].append(tokens[i])
    return title, sections


def plain_text(token: Token) -> str:
    return "".join(child.content for child in token.children or [])


def part_pictures(tokens: Sequence[Token], folder: Path) -> tuple[str, list[str]]:
    """Return a section's HTML without the pictures that stand alone, and those; each holds its file's content."""
    body: list[Token] = []
    figures: list[str] = []
    embed_pictures(tokens, folder)
    for token in tokens:
        body.append(token)
        inline = body[-2] if token.type == "paragraph_close" else None
        if inline is not None and [child.type for child in inline.children or []] == ["image"]:
            [image] = inline.children or []
            caption = escape(image.content)
            figures.append(f"<figure>{render([inline])}<figcaption>{caption}</figcaption></figure>")
            del body[-3:]
    return render(body), figures


def embed_pictures(tokens: Iterable[Token], folder: Path) -> None:
    """Replace the addresses of PNG files in the folder by their content; other pictures become their description."""
    for token in tokens:
        embed_pictures(token.children or [], folder)
        if token.type != "image":
            continue
        picture = folder / str(token.attrGet("src") or "")
        if picture.suffix == ".png" and picture.is_file() and picture.resolve().is_relative_to(folder.resolve()):
            token.attrSet("src", f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}")
        else:
            token.type, token.tag, token.attrs, token.children = "text", "", {}, None


# ---- tables ----------------------------------------------------------------------------------------------------------


def environment(constraints: Path) -> str:
    """Return the table of the packages' exact versions, which the file of constraints holds."""
    lines = (line.partition("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    rows = [
        {"package": name, "version": version} for name, _, version in (line.partition("==") for line in lines) if name
    ]
    return f"<p>Exact versions, from <code>{escape(constraints.name)}</code>.</p>{table(rows)}"


def prediction_table(path: Path) -> str:
    """Return the table of held-out items with what each model made of them, the first ones of very many."""
    with path.open(encoding="utf-8") as lines:
        rows = [flat(json.loads(line)) for line in lines]
    more = f" The first {MOST_ROWS:,} of {len(rows):,}." if len(rows) > MOST_ROWS else ""
    return f"<p>Type into the field to filter, click a heading to sort.{more}</p>{table(rows[:MOST_ROWS])}"


def flat(row: Mapping[str, object]) -> dict[str, str]:
    """Return a row with our models' values as cells of their own, and a mark where GPT is right."""
    cells: dict[str, str] = {}
    for key, value in row.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        if key in ("predicted", "answers"):
            inner = {name: each for name, each in inner.items() if name in MODELS}
        cells |= {f"{key} {name}".strip(): "" if each is None else str(each) for name, each in inner.items()}
    expected, answer = (
        next((cells[key] for key in keys if key in cells), None)
        for keys in (("label", "output"), ("predicted gpt", "answers gpt"))
    )
    if expected is None or answer is None:
        return cells
    return {"GPT": "right" if expected.split() == answer.split() else "wrong", **cells}


def table(rows: Sequence[Row]) -> str:
    """Return rows as an HTML table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    cells = ("".join(f"<td>{escape(row.get(column, ''))}</td>" for column in columns) for row in rows)
    body = "\n".join(f"<tr>{each}</tr>" for each in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def escape(text: str) -> str:
    return html.escape(visible(text))


def slug(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower()).strip("-") or "section"
