"""Write handbook.md and questions.jsonl, the same bytes on every run: notes of an invented maker of lamps, and questions.

    python examples/handbook/make_handbook.py            # rewrites the files beside this script
    python examples/handbook/make_handbook.py --out DIR

The handbook says every fact several times: in a note on one person, lamp or rule, in a list, and in letters to new
apprentices. The questions of train and val
ask for most of the facts. Those of test ask for the same facts in words that train does not have (task `other words`),
and for facts that no question of train asks for (task `never asked`): those a model can only have read.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SEED = 11
NEVER_ASKED = 0.2  # of the facts
LETTERS, SAID = 150, 5  # letters, and facts in each
APPRENTICES = "Nora Emil Lotte Arne Mina Jakob Tessa Piet Wanda Silas".split()

# name, work, room, telephone, free day, drink
PEOPLE = """Agnes Thorn | keeps the accounts | 12 | 4410 | Friday | tea
Bastian Reed | runs the glass workshop | 3 | 4427 | Monday | coffee
Celia Marsh | answers complaints | 14 | 4433 | Wednesday | cocoa
Dorian Pike | drives the van | 1 | 4452 | Tuesday | milk
Elsbeth Crane | designs the lamps | 21 | 4468 | Thursday | tea
Fergus Lowe | tests every lamp | 5 | 4475 | Monday | water
Gwen Archer | buys brass and glass | 16 | 4489 | Friday | coffee
Hanno Stiles | packs the parcels | 2 | 4491 | Wednesday | juice
Isolde Farr | leads the company | 23 | 4500 | Sunday | coffee
Joris Vane | keeps the computers running | 18 | 4516 | Thursday | cola
Katrin Holt | trains the apprentices | 7 | 4524 | Tuesday | tea
Lorenz Quill | writes the catalogue | 19 | 4538 | Monday | cocoa"""
# name, kind, price, colour, metal, guarantee in years
LAMPS = """Heron | floor lamp | 180 | white | steel | five
Wren | desk lamp | 65 | green | brass | three
Owl | reading lamp | 90 | brown | copper | four
Robin | bedside lamp | 40 | red | tin | two
Swan | ceiling lamp | 240 | white | silver | ten
Kestrel | garden lantern | 120 | black | iron | six
Finch | wall lamp | 75 | yellow | brass | three
Raven | street lantern | 310 | black | iron | eight
Dove | night lamp | 25 | blue | tin | nine
Stork | piano lamp | 150 | green | copper | seven"""
# title | sentences of the note | question / question / question in other words | answer
RULES = """Opening hours | Halden Lamps opens at eight in the morning. The doors close at half past five. | When does Halden Lamps open? / At what hour do the doors open? / From when on can a customer come in? | At eight in the morning.
Closing | The last one to leave closes the shutters and hangs the key behind the blue door. | Where does the key hang? / Where do I find the key? / In which place is the key kept at night? | Behind the blue door.
Holidays | Everybody has twenty eight days of holiday a year. Ask for them by the first of March. | How many days of holiday do we have? / How much holiday is there in a year? / How many free days does everybody get? | Twenty eight days.
Illness | Whoever is ill calls Isolde Farr before nine. After three days a letter from the doctor is needed. | Whom do I call when I am ill? / Who has to know that I am ill? / I have a fever today: who must hear of it? | Isolde Farr.
Returns | A customer may return a lamp within forty days. The lamp must be in its box. | How long may a customer return a lamp? / Until when can a lamp be returned? / In what time may a lamp come back? | Within forty days.
Parcels | Parcels leave the yard at three in the afternoon. What is packed later leaves the next day. | When do the parcels leave? / At what hour do parcels leave the yard? / By when is the post gone? | At three in the afternoon.
Glass | Broken glass goes into the grey bin beside the kiln. It must never go into the paper. | Where does broken glass go? / Which bin takes broken glass? / A shade fell and broke: where do I put it? | Into the grey bin beside the kiln.
Fire | In case of fire all meet under the old lime tree. The lifts must not be used. | Where do we meet in case of fire? / What is the meeting place in a fire? / The alarm rings: where shall I go? | Under the old lime tree.
Kiln | The kiln is heated on Mondays and Thursdays. Only Bastian Reed and Katrin Holt may open it. | On which days is the kiln heated? / When is the kiln hot? / What days does the kiln run? | On Mondays and Thursdays.
Password | A new password is due every ninety days. Joris Vane never asks for one. | How often is a new password due? / When must I change my password? / After what time does a password end? | Every ninety days.
Visitors | Visitors sign the red book at the gate and wear a yellow badge. | What do visitors sign? / Where do visitors write their name? / A guest is here: what must be signed? | The red book at the gate.
Travel | Travel by train is paid in full. A car costs thirty cents a mile. | What is paid for a mile by car? / How much does a mile by car bring? / I drove to a customer: what do I get a mile? | Thirty cents.
Meeting | All of us meet on Tuesdays at ten in the long room. The meeting ends at eleven. | When do all of us meet? / On which day is the meeting? / What is the time of the weekly meeting? | On Tuesdays at ten.
Canteen | The canteen serves soup from noon to one. A bowl costs two coins. | What does a bowl of soup cost? / How much is the soup? / What do I pay for lunch in the canteen? | Two coins.
Founding | Halden Lamps was founded in 1931 by Mathilda Halden in a stable by the river. | Who founded Halden Lamps? / Who was the founder? / Whom do we owe the company to? | Mathilda Halden.
Repairs | A repair costs twelve coins. It is free for the years of the guarantee. | What does a repair cost? / How much is a repair? / What is the price of mending a lamp? | Twelve coins.
Discount | People who work here buy lamps for two thirds of the price. Friends and family do not. | What do people who work here pay for a lamp? / How much of the price do we pay? / What is a lamp for us, who work here? | Two thirds of the price.
Bicycles | Bicycles stand in the shed behind the canteen. The shed is locked at seven. | Where do the bicycles stand? / Where can I leave my bicycle? / I came by bike: where does it go? | In the shed behind the canteen."""
PERSON = [  # attribute, sentence of the note, of a letter, questions (the last in words that train does not have), answer
    ("work", "{name} {work}.", "It is {name} who {work}.", "What does {name} do? / What is the work of {name}? / Tell me the job of {name}.", "{name} {work}."),
    ("room", "{name} sits in room {room}.", "You find {name} in room {room}.", "In which room is {name}? / Where does {name} sit? / Where do I find {name}?", "In room {room}."),
    ("telephone", "The telephone number of {name} is {telephone}.", "Call {name} at {telephone}.", "What is the telephone number of {name}? / Which number do I call for {name}? / How can I ring {name}?", "The number is {telephone}."),
    ("day", "On {day} {name} is not at work.", "{name} does not work on {day}.", "On which day is {name} not at work? / When is {name} not at work? / Which day does {name} have off?", "On {day}."),
    ("drink", "{name} drinks {drink}.", "Bring {drink} if you visit {name}.", "What does {name} drink? / Which drink does {name} take? / What can I bring {name} to drink?", "{name} drinks {drink}."),
]  # fmt: skip
LAMP = [
    ("price", "The {name} costs {price} coins.", "Ask {price} coins for the {name}.", "What does the {name} cost? / What is the price of the {name}? / How much do I pay for the {name}?", "The {name} costs {price} coins."),
    ("kind", "The {name} is a {kind}.", "We call our {kind} the {name}.", "What kind of lamp is the {name}? / What is the {name}? / Tell me what the {name} is.", "The {name} is a {kind}."),
    ("colour", "The shade of the {name} is {colour}.", "The {name} has a {colour} shade.", "What colour is the {name}? / Which colour does the {name} have? / Tell me the colour of the {name}.", "The {name} is {colour}."),
    ("metal", "Its body is made of {metal}.", "For the {name} we use {metal}.", "What is the {name} made of? / Which metal is the {name} made of? / From what do we make the {name}?", "The {name} is made of {metal}."),
    ("guarantee", "The {name} has a guarantee of {guarantee} years.", "We mend the {name} for {guarantee} years.", "How long is the guarantee of the {name}? / How many years of guarantee does the {name} have? / Until when do we mend the {name} for nothing?", "The guarantee is {guarantee} years."),
]  # fmt: skip


class Fact(NamedTuple):
    """A fact of the handbook: the questions that ask for it, the last in words of its own, and the answer."""

    questions: list[str]
    answer: str


def table(text: str, names: str) -> list[dict[str, str]]:
    return [dict(zip(names.split(), map(str.strip, line.split("|")), strict=True)) for line in text.splitlines()]


def make_notes(rng: random.Random) -> tuple[list[str], list[Fact]]:
    """Return the documents of the handbook and the facts in them."""
    people = table(PEOPLE, "name work room telephone day drink")
    lamps = table(LAMPS, "name kind price colour metal guarantee")
    notes, said, facts = [], [], []
    for rows, forms, title in ((people, PERSON, "{name}"), (lamps, LAMP, "The {name}")):
        for row in rows:
            sentences = [sentence.format(**row) for _, sentence, *_ in forms]
            notes.append(f"## {title.format(**row)}\n\n{' '.join(sentences)}")
            said += [sentence.format(**row) for _, _, sentence, *_ in forms]
            facts += [
                Fact([q.format(**row) for q in questions.split(" / ")], answer.format(**row))
                for *_, questions, answer in forms
            ]
    for rule in table(RULES, "title text questions answer"):
        notes.append(f"## {rule['title']}\n\n{rule['text']}")
        facts.append(Fact(rule["questions"].split(" / "), rule["answer"]))
        said.append(rule["text"])
    rng.shuffle(notes)
    letters = [
        f"## To {rng.choice(APPRENTICES)}, week {week % 50 + 1}\n\n{' '.join(rng.sample(said, SAID))}"
        for week in range(LETTERS)
    ]
    lists = [
        "## " + heading + "\n\n" + "\n".join(f"- {row['name']}: {form.format(**row)}" for row in rng.sample(rows, len(rows)))
        for heading, form, rows in (
            ("Who does what", "{work}", people),
            ("Rooms", "room {room}", people),
            ("Telephone numbers", "{telephone}", people),
            ("Free days", "{day}", people),
            ("What we drink", "{drink}", people),
            ("Prices", "{price} coins", lamps),
            ("Kinds of lamps", "a {kind}", lamps),
            ("Colours", "{colour}", lamps),
            ("Metals", "{metal}", lamps),
            ("Guarantees", "{guarantee} years", lamps),
        )
    ]  # fmt: skip
    return notes + lists + letters, facts


def make_questions(facts: list[Fact]) -> Iterator[dict[str, str]]:
    """Yield instruction pairs with their task and split."""
    for fact in facts:
        share = zlib.crc32(fact.answer.encode() + fact.questions[0].encode()) / 2**32
        *usual, other = fact.questions
        if share < NEVER_ASKED:
            yield pair(usual[0], fact.answer, "never asked", "test")
            continue
        for question in usual:
            yield pair(question, fact.answer, "as asked", "train")
        val = share > 1 - NEVER_ASKED
        yield pair(other, fact.answer, "other words", "val" if val else "test")


def pair(question: str, answer: str, task: str, split: str) -> dict[str, str]:
    return {"instruction": question, "output": answer, "task": task, "split": split}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the example handbook and questions on it.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    notes, facts = make_notes(random.Random(SEED))
    text = "# Handbook of Halden Lamps\n\n" + "\n\n".join(notes) + "\n"
    (folder / "handbook.md").write_text(text, encoding="utf-8", newline="\n")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_questions(facts)]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
