"""Write a large corpus with faults in it, to measure `tokenize.clean` on: the same bytes on every run.

    python examples/cleaning/make_corpus.py OUT --megabytes 1000 --text NOVEL.txt NOVEL.txt

Most documents are sentences of the texts, drawn at random: no two are alike, and all share sentences. Of 100 documents
3 repeat an earlier one, 5 repeat one with a tenth of the words changed, 8 are in another language, 3 are no prose,
4 were decoded wrongly, 4 have invisible characters, and 5 hold personal data.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SEED, RECENT = 5, 1000  # documents that may be repeated
SEPARATOR = "\n\n\n"
PERSONAL = ("anna.bell@example.org", "+49 30 1234567", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00")
FOREIGN = [
    "Das Wetter in den Bergen schlug schnell um. Die Reisenden hatten das Dorf am Morgen verlassen. Sie waren froh, als sie die Lichter des Gasthauses sahen. Am Feuer erzählten sie vom langen Weg. Der Wirt brachte Suppe und Brot.",
    "Le temps changea vite dans les montagnes. Les voyageurs avaient quitté le village le matin. Ils furent heureux de voir les lumières de l'auberge. Ils s'assirent près du feu et parlèrent du chemin. L'hôte apporta la soupe.",
    "El tiempo cambió rápidamente en las montañas. Los viajeros habían salido del pueblo por la mañana. Se alegraron al ver las luces de la posada. Se sentaron junto al fuego y hablaron del camino. El dueño trajo sopa y pan.",
    "Погода в горах быстро переменилась. Путники вышли утром из деревни. Они обрадовались, когда увидели огни постоялого двора. Они сели у огня и рассказывали о долгой дороге. Хозяин принёс суп и хлеб.",
]


class Material(NamedTuple):
    """Sentences and words to draw from."""

    sentences: list[str]
    words: list[str]
    foreign: list[list[str]]


def read_material(paths: list[Path]) -> Material:
    text = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
    foreign = [re.split(r"(?<=\.) ", part) for part in FOREIGN]
    return Material([part for part in sentences if 40 <= len(part) <= 400], text.split(), foreign)


def make_documents(material: Material, rng: random.Random) -> Iterator[str]:
    """Yield documents without end."""
    recent = deque([prose(material, rng)], RECENT)
    while True:
        kind = rng.randrange(100)
        if kind < 3:
            yield rng.choice(recent)
        elif kind < 8:
            yield with_other_words(rng.choice(recent), material, rng)
        elif kind < 16:
            yield " ".join(rng.choices(rng.choice(material.foreign), k=rng.randint(4, 20)))
        elif kind < 19:
            yield " ".join(f"{rng.random():.6f} #{rng.randrange(9999)}" for _ in range(rng.randint(50, 200)))
        else:
            text = prose(material, rng)
            recent.append(text)
            yield with_fault(text, kind, rng)


def prose(material: Material, rng: random.Random) -> str:
    """Return 1 to 6 paragraphs of 5 to 10 sentences."""
    return "\n\n".join(
        " ".join(rng.choices(material.sentences, k=rng.randint(5, 10))) for _ in range(rng.randint(1, 6))
    )


def with_other_words(text: str, material: Material, rng: random.Random) -> str:
    """Return a text with a tenth of its words changed."""
    parts = re.split(r"(\s+)", text)
    words = range(0, len(parts), 2)
    for place in rng.sample(words, len(words) // 10):
        parts[place] = rng.choice(material.words)
    return "".join(parts)


def with_fault(text: str, kind: int, rng: random.Random) -> str:
    if kind < 23:
        return text.replace("e", "é").encode().decode("latin-1")
    if kind < 27:
        return text.replace("th", "t\u200bh")
    return f"{text} Write to {rng.choice(PERSONAL)} today." if kind < 32 else text


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a large corpus with faults in it.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="English texts to draw sentences from")
    args = parser.parse_args()
    size = n = 0
    with args.out.open("wb") as file:
        for document in make_documents(read_material(args.text), random.Random(SEED)):
            size += file.write((document + SEPARATOR).encode())
            n += 1
            if size >= 1_000_000 * args.megabytes:
                break
    print(f"{args.out}: {n:,} documents, {size:,} bytes")


if __name__ == "__main__":
    main()
