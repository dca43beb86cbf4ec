"""Writes the sample source: its stories, messages, instruction pairs and conversations, the same bytes on every run.

    python data/sample/make_sample.py            # rewrites the files beside this script
    python data/sample/make_sample.py --out DIR

One small world feeds all files. People move, carry, give, sell and teach; what a story says later agrees with what
it said before, because it is read off a world state. The stories use every name and word. The instruction pairs hold some
names and words back for val and test, so that a model can answer those only from what the stories taught it.

Templates are small grammars: `[walked|ran]` chooses one of its parts, `{a}` is filled in afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

SEED = 20
STORIES = 2700
MESSAGES = {"train": 6000, "val": 400, "test": 1000}
INSTRUCTIONS = {"train": 12000, "val": 300, "test": 600}
CONVERSATIONS = {"train": 2000, "val": 60, "test": 240}

# ---- words -----------------------------------------------------------------------------------------------------------

WOMEN = """Ada Anna Berta Clara Dora Emma Frida Greta Hilda Ida Julia Lena Marta Nadia Olga Paula Rosa Sofia Tilda Vera""".split()
MEN = """Adam Bruno Carl David Edgar Felix Georg Hugo Ivan Jonas Lars Magnus Nils Otto Pavel Peter Simon Tomas Viktor
Walter""".split()
PEOPLE = sorted(WOMEN + MEN)
PLACES = """mill bakery market harbour school well chapel barn orchard bridge inn forge garden library tower ferry meadow
square stable station""".split()
OBJECTS = """lamp rope basket knife kettle hammer blanket candle mirror drum flute ladder bucket ring key map book letter
box brush bell saddle net axe clock spoon cup plate jug scarf coat hat boot purse whistle violin torch watch""".split()
FOODS = """apple pear plum cherry loaf egg potato tomato carrot onion peach radish berry nut cake melon sausage
biscuit""".split()
ANIMALS = "goat sheep cow hen goose duck mouse cat dog horse donkey pig ox rabbit fox wolf calf pony frog bee".split()
IRREGULAR = {"knife": "knives", "loaf": "loaves", "calf": "calves", "wolf": "wolves", "scarf": "scarves", "ox": "oxen",
             "goose": "geese", "mouse": "mice", "sheep": "sheep"}  # fmt: skip
COLOURS = "red blue green yellow white black brown grey".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
WEATHER = {"rain": "rainy", "snow": "snowy", "fog": "foggy", "sunshine": "sunny", "wind": "windy", "frost": "frosty"}
TRADES = """baker miller smith fisher weaver potter farmer teacher carpenter ferryman gardener tailor shepherd innkeeper
doctor painter""".split()
SMALL_TO_LARGE = (
    "flea ant bee mouse duck cat goat pony cow elephant whale".split(),
    "seed coin cup kettle barrel cart house tower hill".split(),
)
# Adjectives and their opposites, by what they can be said of.
OPPOSITES_OF = {
    "thing": """heavy-light bright-dark long-short wet-dry clean-dirty soft-hard thick-thin wide-narrow cheap-costly
    whole-broken sharp-blunt tight-loose""",
    "animal": "old-young strong-weak fast-slow loud-quiet happy-sad lazy-busy wild-tame brave-timid",
    "food": "hot-cold sweet-sour fresh-stale raw-cooked",
    "place": "full-empty open-closed safe-dangerous near-far",
    "sea": "deep-shallow calm-stormy",
    "answer": "true-false easy-difficult early-late",
    "stranger": "rich-poor kind-cruel polite-rude clever-foolish generous-stingy",
}
PAIRS_OF = {kind: [tuple(pair.split("-")) for pair in pairs.split()] for kind, pairs in OPPOSITES_OF.items()}
OPPOSITES = [pair for pairs in PAIRS_OF.values() for pair in pairs]
OPPOSITE = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
NOUNS_OF = {"thing": OBJECTS, "animal": ANIMALS, "food": FOODS, "place": PLACES}  # the other kinds are nouns themselves
NOUNS_FOR = {word: NOUNS_OF.get(kind, [kind]) for kind, pairs in PAIRS_OF.items() for pair in pairs for word in pair}
# Velic, the language of the traders from over the sea; an adjective follows its noun.
VELIC_NOUNS = dict(
    pair.split("=")
    for pair in """lamp=sorin rope=talgo basket=merul knife=krev kettle=dombo hammer=tukar candle=silu mirror=orvia drum=bodum
    flute=lirel ladder=stegga ring=zinel key=klio map=harta book=lumira letter=venda box=kosta bell=dalin clock=temor
    cup=kuva hat=chapu coat=mantor apple=poma egg=ovik goat=kezza cow=vakura hen=gallo horse=ekvan""".split()
)
VELIC_ADJECTIVES = dict(
    pair.split("=")
    for pair in "red=rosk blue=azul green=verdo white=blanu black=nigor old=vetra big=magno small=pikto".split()
)
VERBS = {  # present, past, what may follow
    "carries": "carried", "brings": "brought", "takes": "took", "pulls": "pulled", "throws": "threw", "sends": "sent",
    "drags": "dragged", "drives": "drove", "moves": "moved", "returns": "returned", "steals": "stole", "leads": "led",
}  # fmt: skip
CRAFTS = {
    "finds": "found", "buys": "bought", "sells": "sold", "paints": "painted", "loses": "lost", "hides": "hid",
    "breaks": "broke", "mends": "mended", "makes": "made", "sees": "saw", "keeps": "kept", "wants": "wanted",
    "draws": "drew", "cleans": "cleaned", "holds": "held", "forgets": "forgot", "chooses": "chose", "shows": "showed",
}  # fmt: skip

# Names and words that the instruction pairs of train never use; the stories use them all.
HELD_NAMES = PEOPLE[3::9]
HELD_OPPOSITES = OPPOSITES[2::14]
HELD_PLURALS = (OBJECTS + FOODS + ANIMALS)[1::19]
HELD_VELIC = sorted(VELIC_NOUNS)[1::14]
HELD_EVERY = 10  # so many tries for a pair of val or test make one that asks for them; the others combine known words

# ---- grammar ---------------------------------------------------------------------------------------------------------

CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(rng: random.Random, template: str, **slots: object) -> str:
    """`expand(rng, "{a} [ran|walked].", a="Mira")` gives "Mira ran." or "Mira walked."; choices may nest."""
    while match := CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return template.format(**slots)


def plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh", "to")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def counted(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def listing(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1]


# ---- the world -------------------------------------------------------------------------------------------------------


class World:
    """Places and owners. Each action changes them and returns the sentence that tells it."""

    def __init__(
        self, rng: random.Random, people: Sequence[str], objects: Sequence[str], places: Sequence[str]
    ) -> None:
        self.rng, self.places = rng, places
        self.person_at: dict[str, str] = {person: rng.choice(places) for person in people}
        self.object_at: dict[str, str] = {thing: rng.choice(places) for thing in objects}
        self.owner: dict[str, str] = {}  # of the objects that somebody carries
        self.left: set[str] = set()  # objects that somebody put down
        self.told: set[str] = set()  # people whose place the reader knows
        self.gifts: list[tuple[str, str, str]] = []  # giver, object, receiver

    def go(self, person: str, place: str) -> str:
        self.person_at[person] = place
        self.told.add(person)
        for thing in self.carried(person):
            self.object_at[thing] = place
        return expand(self.rng, "{a} [went|walked|ran|hurried|rode|came] to the {p}.", a=person, p=place)

    def take(self, person: str, thing: str) -> str:
        self.person_at[person] = self.object_at[thing]
        self.owner[thing] = person
        self.left.discard(thing)
        self.told.add(person)
        text = "[{a} took the {o} from the {p}|{a} found the {o} at the {p}|At the {p} {a} picked up the {o}]."
        return expand(self.rng, text, a=person, o=thing, p=self.object_at[thing])

    def give(self, thing: str, receiver: str) -> str:
        giver = self.owner[thing]
        self.owner[thing] = receiver
        self.person_at[receiver] = self.object_at[thing] = self.person_at[giver]
        self.told |= {giver, receiver}
        self.gifts = [gift for gift in self.gifts if gift[1] != thing] + [(giver, thing, receiver)]
        text = "{a} [gave the {o} to {b}|handed the {o} to {b}|gave {b} the {o}|passed the {o} to {b}]."
        return expand(self.rng, text, a=giver, o=thing, b=receiver)

    def leave(self, thing: str) -> str:
        person = self.owner.pop(thing)
        self.left.add(thing)
        text = "{a} [left the {o} at the {p}|put the {o} down at the {p}|forgot the {o} at the {p}]."
        return expand(self.rng, text, a=person, o=thing, p=self.object_at[thing])

    def can_be(self, person: str, place: str) -> bool:
        """Return True if a person stands at a place, or the reader has not been told where."""
        return person not in self.told or self.person_at[person] == place

    def carried(self, person: str) -> list[str]:
        return [thing for thing, owner in self.owner.items() if owner == person]

    def step(self) -> str:
        """One more event that is possible now."""
        rng, people = self.rng, sorted(self.person_at)
        free = [thing for thing in self.object_at if thing not in self.owner]
        moves: list[Callable[[], str]] = []
        pairs = [(person, thing) for thing in free for person in people if self.can_be(person, self.object_at[thing])]
        if pairs:
            moves += [lambda: self.take(*rng.choice(pairs))]
        if self.owner:
            thing = rng.choice(sorted(self.owner))
            near = [p for p in people if p != self.owner[thing] and self.can_be(p, self.object_at[thing])]
            if near:
                moves += 3 * [lambda: self.give(thing, rng.choice(near))]
            moves += [lambda: self.leave(thing)]
        walker = rng.choice(people)
        elsewhere = [place for place in self.places if place != self.person_at[walker]]
        moves += 2 * [lambda: self.go(walker, rng.choice(elsewhere))]
        return rng.choice(moves)()

    def questions(self) -> list[tuple[str, str]]:
        """Everything that can be asked about the state and has exactly one answer in the text."""
        found = []
        for thing, owner in self.owner.items():
            found.append((f"Who has the {thing}?", f"{owner} has the {thing}."))
            if len(self.carried(owner)) == 1:
                found.append((f"What does {owner} have?", f"{owner} has the {thing}."))
        for thing, place in self.object_at.items():
            if thing in self.left:
                found.append((f"Where is the {thing}?", f"The {thing} is at the {place}."))
        for person in sorted(self.told):
            found.append((f"Where is {person}?", f"{person} is at the {self.person_at[person]}."))
        for giver, thing, receiver in self.gifts:
            found.append((f"Who gave the {thing} to {receiver}?", f"{giver} gave the {thing} to {receiver}."))
            found.append((f"Who got the {thing} from {giver}?", f"{receiver} got the {thing} from {giver}."))
        return found


def small_world(
    rng: random.Random, names: Sequence[str], steps: int, n_people: int = 2, n_objects: int = 1
) -> tuple[World, list[str]]:
    world = World(rng, rng.sample(names, n_people), rng.sample(OBJECTS, n_objects), rng.sample(PLACES, 3))
    told = [world.take(rng.choice(sorted(world.person_at)), next(iter(world.object_at)))]
    while len(told) < steps:
        told.append(world.step())
    return world, told


class Deck(Generic[T]):
    """Cards in a shuffled order, again and again: each is drawn equally often, so that every fact is taught."""

    def __init__(self, rng: random.Random, cards: Sequence[T]) -> None:
        self.rng, self.cards, self.rest = rng, cards, list[T]()

    def draw(self) -> T:
        self.rest = self.rest or self.rng.sample(self.cards, len(self.cards))
        return self.rest.pop()


class Facts:
    """Decks of the words and tasks that stories teach."""

    def __init__(self, rng: random.Random) -> None:
        self.lessons = Deck(rng, ["opposite"] * 3 + ["plural"] * 3 + ["velic"] * 4 + ["sort", "sort", "count"])
        self.opposites = Deck(rng, sorted(OPPOSITE))
        self.plurals = Deck(rng, OBJECTS + FOODS + ANIMALS)
        self.velic = Deck(rng, sorted(VELIC_NOUNS))


# ---- stories ---------------------------------------------------------------------------------------------------------


def ask(rng: random.Random, asker: str, answerer: str, question: str, answer: str) -> str:
    said = answer.rstrip(".")
    text = '"{q}" [asked {x}|{x} asked|{x} wanted to know]. "{s}," [said {y}|{y} said|answered {y}|{y} answered].'
    return expand(rng, text, q=question, s=said, x=asker, y=answerer)


class Frame(NamedTuple):
    """A story's first sentences, which its end comes back to."""

    text: str
    person: str
    trade: str
    place: str
    day: str
    weather: str


def opening(rng: random.Random, person: str, place: str) -> Frame:
    weather, trade, day = rng.choice(sorted(WEATHER)), rng.choice(TRADES), rng.choice(DAYS)
    template = rng.choice(
        (
            "One {w} {d}[ morning| evening|] {x} the {t} [was|stood|worked|sat] at the {p}.",
            "It was a {w} {d}[ morning| evening|]. {x} the {t} [was|waited] at the {p}.",
            "On {d} there was {n}[ all day|]. {x} the {t} [was|waited|worked] at the {p}.",
            "{x} the {t} [was|sat|stood] at the {p}. It was {d}, and there was {n}.",
            "[Early|Late] on a {w} {d} {x} the {t} [came|walked|went] to the {p}.",
            "The {n} [began|came|stopped] on {d}. {x} the {t} [was glad|did not like it] and stayed at the {p}.",
        )
    )
    text = expand(rng, template, w=WEATHER[weather], n=weather, d=day, x=person, p=place, t=trade)
    return Frame(text, person, trade, place, day, weather)


def closing(rng: random.Random, frame: Frame) -> str:
    template = rng.choice(
        (
            "[That was|So ended|Nobody forgot] that {w} {d}.",
            "The {n} [went on|stopped], and {x} went home.",
            "On the day after {d} there was no more {n}.",
            "{x} [slept well|was content|sang all the way home] that {d}.",
            "The {t} [stayed|ate some bread|waited for a friend] at the {p}[ until it was dark|].",
            "[Then|At last] the {t} went home[ through the {n}|].",
        )
    )
    return expand(
        rng,
        template,
        w=WEATHER[frame.weather],
        n=frame.weather,
        d=frame.day,
        x=frame.person,
        p=frame.place,
        t=frame.trade,
    )


def carrying_story(rng: random.Random, facts: Facts) -> list[str]:
    """People carry things about; at the end somebody asks and is told, and the village book keeps a line of it."""
    world, told = small_world(rng, PEOPLE, rng.randint(3, 6), rng.choice((2, 2, 3)), rng.choice((1, 1, 2)))
    people = sorted(world.person_at)
    asker = rng.choice([person for person in PEOPLE if person not in people])
    frame = opening(rng, asker, rng.choice([p for p in PLACES if p not in world.places]))
    talk = []
    for question, answer in some(rng, world.questions(), 1, 3):
        others = [person for person in people if person not in answer]  # nobody speaks of oneself by name
        talk.append(ask(rng, asker, rng.choice(others or people), question, answer))
    end = []
    if world.gifts and rng.random() < 0.7:
        giver, thing, receiver = world.gifts[-1]
        line = f"{giver} gave the {thing} to {receiver}."
        end.append(
            expand(
                rng, "[In short|In one line|The village book says|{x} wrote in the village book]: {s}", x=asker, s=line
            )
        )
    else:
        end.append(closing(rng, frame))
    return [" ".join([frame.text, *told]), "\n".join(talk), *end]


def some(rng: random.Random, items: Sequence[T], low: int, high: int) -> list[T]:
    return rng.sample(items, min(len(items), rng.randint(low, high)))


def market_story(rng: random.Random, facts: Facts) -> list[str]:
    """A seller counts goods, sells some, counts again; the goods are laid out in order."""
    seller, buyer, other = rng.sample(PEOPLE, 3)
    food = rng.choice(FOODS + ANIMALS[:6])
    frame = opening(rng, seller, "market")
    lines = [frame.text, expand(rng, "{x} had {n}[ to sell|].", x=seller, n=counted(start := rng.randint(4, 12), food))]
    left = start
    for person in (buyer, other)[: rng.randint(1, 2)]:
        if left < 2:
            break
        n = rng.randint(1, left - 1)
        left -= n
        text = "{y} bought {k} from {x}." if rng.random() < 0.6 else "{x} [sold|gave] {k} to {y}."
        lines.append(expand(rng, text, x=seller, y=person, k=counted(n, food)))
        lines.append(
            expand(rng, "[Now {x} had {l}.|Then {x} had {l} left.|{x} still had {l}.]", x=seller, l=counted(left, food))
            if rng.random() < 0.5 or left == 1
            else ""
        )
    talk = [
        ask(
            rng,
            buyer,
            seller,
            f"How many {plural(food)} does {seller} have now?",
            f"{seller} has {counted(left, food)}.",
        )
    ]
    goods = rng.sample(OBJECTS + FOODS, rng.randint(3, 5))
    count = f"There are {NUMBERS[len(goods)]} things."
    talk.append(
        f"On the table lay {listing([a(g) for g in goods])}. "
        + ask(rng, other, buyer, "How many things are there?", count)
    )
    if rng.random() < 0.6:
        talk.append(sorting(rng, other))
    return [" ".join(filter(None, lines)), "\n".join(some(rng, talk, 2, 3)), closing(rng, frame)]


def alphabet_words(rng: random.Random, words: Sequence[str], n: int) -> list[str]:
    """`n` words with different first letters."""
    chosen: dict[str, str] = {}
    while len(chosen) < n:
        word = rng.choice(words)
        chosen.setdefault(word[0], word)
    return list(chosen.values())


def sorting(rng: random.Random, person: str) -> str:
    if rng.random() < 0.5:
        words = alphabet_words(rng, OBJECTS + FOODS + ANIMALS, rng.choice((3, 3, 4)))
        order, how = sorted(words), rng.choice(("by the alphabet", "in alphabetical order"))
    else:
        chain = rng.choice(SMALL_TO_LARGE)
        words = rng.sample(chain, 3)
        order, how = sorted(words, key=chain.index), "by size"
    template = rng.choice(
        (
            "[{x} wrote|There were|The words were] {w}. {x} [sorted|put] them {h}: {o}.",
            '"[Sort|Put] {w} {h}[, please|]," [they said|somebody said]. "{o}," said {x}.',
        )
    )
    return expand(rng, template, x=person, w=", ".join(words), o=", ".join(order), h=how)


def lesson(rng: random.Random, facts: Facts, teacher: str, pupil: str) -> str:
    kind = facts.lessons.draw()
    if kind == "opposite":
        word = facts.opposites.draw()
        return ask(
            rng, teacher, pupil, f"What is the opposite of {word}?", f"The opposite of {word} is {OPPOSITE[word]}."
        )
    if kind == "plural":
        noun = facts.plurals.draw()
        return ask(rng, teacher, pupil, f"What is the plural of {noun}?", f"The plural of {noun} is {plural(noun)}.")
    if kind == "velic":
        english, velic = velic_phrase(rng, facts.velic.draw())
        return ask(rng, teacher, pupil, f"What is {english} in Velic?", f"In Velic {english} is {velic}.")
    if kind == "sort":
        return sorting(rng, pupil)
    things = rng.sample(OBJECTS + FOODS, rng.randint(2, 5))
    return f"{teacher} drew {listing([a(t) for t in things])}. " + ask(
        rng, teacher, pupil, "How many things are there?", f"There are {NUMBERS[len(things)]} things."
    )


def velic_phrase(rng: random.Random, noun: str) -> tuple[str, str]:
    if rng.random() < 0.4:
        return noun, VELIC_NOUNS[noun]
    adjective = rng.choice(sorted(VELIC_ADJECTIVES))
    return f"{adjective} {noun}", f"{VELIC_NOUNS[noun]} {VELIC_ADJECTIVES[adjective]}"


def school_story(rng: random.Random, facts: Facts) -> list[str]:
    teacher, *pupils = rng.sample(PEOPLE, 3)
    frame = opening(rng, teacher, "school")
    second = expand(
        rng, "{x} [was the teacher of|taught|had a lesson for] {y} and {z}.", x=teacher, y=pupils[0], z=pupils[1]
    )
    talk = list({lesson(rng, facts, teacher, rng.choice(pupils)): None for _ in range(rng.randint(4, 6))})
    return [f"{frame.text} {second}", "\n".join(talk), closing(rng, frame)]


def plain_event(rng: random.Random, names: Sequence[str]) -> tuple[str, str]:
    """One sentence in the present and in the past."""
    x, y = rng.sample(names, 2)
    thing, place = rng.choice(OBJECTS + FOODS + ANIMALS), rng.choice(PLACES)
    if rng.random() < 0.5:
        verb = rng.choice(sorted(VERBS))
        rest = rng.choice((f"the {thing} to the {place}", f"the {thing} to {y}"))
        return f"{x} {verb} {rest}.", f"{x} {VERBS[verb]} {rest}."
    verb = rng.choice(sorted(CRAFTS))
    rest = f"{a(rng.choice(COLOURS))} {thing} at the {place}"
    return f"{x} {verb} {rest}.", f"{x} {CRAFTS[verb]} {rest}."


def diary_story(rng: random.Random, facts: Facts) -> list[str]:
    """Write events in the present and again in the past, at times with a talk on who gave what to whom."""
    writer, reader = rng.sample(PEOPLE, 2)
    frame = opening(rng, writer, rng.choice(PLACES))
    events = [plain_event(rng, [p for p in PEOPLE if p not in (writer, reader)]) for _ in range(rng.randint(2, 3))]
    now = expand(rng, "{x} [wrote into the diary|wrote|looked out and wrote]: ", x=writer) + " ".join(
        e[0] for e in events
    )
    then = expand(
        rng, "[A day later|The next day|A week later] {x} told {y}[ about it|]: ", x=writer, y=reader
    ) + " ".join(e[1] for e in events)
    x, y = rng.sample(PEOPLE, 2)
    verb, thing = rng.choice(("gave", "sold", "showed", "lent")), rng.choice(OBJECTS)
    swap = f'"{x} {verb} the {thing} to {y}," said {reader}. "No," said {writer}, "it was the other way round. {y} {verb} the {thing} to {x}."'
    return [frame.text, now, then, *([swap] if rng.random() < 0.6 else []), closing(rng, frame)]


def errand_story(rng: random.Random, facts: Facts) -> list[str]:
    """A list of words goes from mouth to mouth and stays the same."""
    sender, child, third = rng.sample(PEOPLE, 3)
    frame = opening(rng, sender, rng.choice(PLACES))
    words = rng.choice((PEOPLE, OBJECTS, FOODS + ANIMALS, OBJECTS + FOODS + sorted(OPPOSITE)))
    said = ", ".join(rng.sample(words, rng.randint(4, 8)))
    lines = [
        expand(rng, "{x} told {y} to [remember|keep in mind]: {s}.", x=sender, y=child, s=said),
        expand(rng, '"{s}," [said|repeated] {y}[ on the way|].', y=child, s=said),
        expand(rng, "{z} [heard it|was there] and [wrote|wrote down]: {s}.", z=third, s=said),
    ]
    return [frame.text, "\n".join(lines), closing(rng, frame)]


def adjective_story(rng: random.Random, facts: Facts) -> list[str]:
    x, y = rng.sample(PEOPLE, 2)
    frame = opening(rng, x, rng.choice(PLACES))
    lines = []
    for word in [facts.opposites.draw() for _ in range(rng.randint(3, 5))]:
        template = rng.choice(
            (
                '"Is the {t} {w}?" asked {x}. "No, the {t} is {o}," said {y}.',
                '"The {t} is {w}," said {x}. "You are wrong," [said|answered] {y}. "The {t} is {o}."',
                "{x} [thought|believed|had heard] that the {t} was {w}, but the {t} was {o}.",
                "{x} [hoped|feared] that the {t} was {w}. {y} [knew|saw] that it was {o}.",
            )
        )
        lines.append(expand(rng, template, t=rng.choice(NOUNS_FOR[word]), w=word, o=OPPOSITE[word], x=x, y=y))
    return [frame.text, "\n".join(lines), closing(rng, frame)]


def note_story(rng: random.Random, facts: Facts) -> list[str]:
    """Somebody gets a note; the village finds out whether it was honest."""
    x, y = rng.sample(PEOPLE, 2)
    frame = opening(rng, x, rng.choice(PLACES))
    label = rng.choice(("ham", "spam"))
    text = message(rng, label)
    verdict = {
        "ham": "It was an honest note[, and {x} was glad|].",
        "spam": "It was a trick[, and {x} burned the note|].",
    }[label]
    return [
        f"{frame.text} {x} got a note: {text}",
        expand(rng, "{x} showed the note to {y}. " + verdict, x=x, y=y),
        closing(rng, frame),
    ]


SCENES = (
    [carrying_story] * 6
    + [market_story] * 3
    + [school_story] * 7
    + [diary_story] * 3
    + [errand_story] * 10
    + [adjective_story] * 2
    + [note_story] * 3
)

# ---- messages --------------------------------------------------------------------------------------------------------

FIRMS = [
    "Lucky Barrel",
    "Golden Wheel",
    "Silver Star",
    "Happy Fox",
    "Seven Bells",
    "Royal Wheel",
    "Magic Well",
    "Sure Win",
]
PRIZES = [
    "a cow",
    "a pony",
    "a golden ring",
    "a new cart",
    "a boat",
    "a silver clock",
    "a house by the harbour",
    "a white horse",
]
KIN_OF = {True: "sister aunt niece cousin".split(), False: "brother uncle nephew cousin".split()}  # a woman or a man

EASY = {
    "spam": [
        "[WIN|WINNER|CONGRATULATIONS]! You have won {prize} at the {firm}! [Send|Pay] {n} coins [now|today] to [claim|get] your prize!",
        "FREE {o}! Free {o2}! Only today at the {firm}. Reply [YES|NOW] with {n} coins[!|!!!]",
        "Your [last chance|lucky day]! The {firm} doubles your coins. [Visit|See] {link} and [enter|give] the code of your door!",
        "[URGENT|ATTENTION]: your box at the {p} will be [closed|emptied]. [Send|Confirm] your code at {link} [today|before {d}].",
        "Dear winner, the {firm} has chosen you. [Pay|Send] the fee of {n} coins and {prize} is yours!",
        "[Earn|Make] {n} coins a day without work! [Write to|Visit] {link} [now|today].",
    ],
    "ham": [
        "[Hello|Hi|Dear] {x}, [the {f} cake is ready|the soup is on the table|I am at the {p}]. [Come when you like|See you on {d}].",
        "I [left|put] your {o} at the {p}. {y} [saw it there|has the {o2} too].",
        "[Can we|Shall we] meet at the {p} on {d}? {y} [comes too|cannot come]. {x}",
        "Thank you for the {o}[, {x}|]. [It works well|The children like it|I will bring it back on {d}].",
        "The {p} is closed on {d} because of the {w}. [We meet at the {p2}|Tell {y}], {x}.",
        "[My|Our] {k} {y} is [sick|well again|coming on {d}]. [Could you feed the {an}?|Please ring the bell.]",
        "School starts [late|early] on {d}. {y} has to bring the {o} and {m} {fs}.",
        "[I sold|We sold] {m} {fs} at the market, and {y} bought the {o}.",
    ],
}
TRICKY = {
    "spam": [  # no trigger word, no digit: a stranger or a false friend wants something
        "[Hello|Good evening], it is me. I lost my purse [at the {p}|on the road]. Could you leave {m} coins under the bench at the {p2}? I cannot meet you.",
        "You do not know me, but I [knew|worked for] your {k}. [Leave|Put] the key of your house at the {p} and I will look after the {an}.",
        "I found a {o} full of silver and will share it with you. First I need {m} coins from you for the ferry.",
        "We are from the {p}. [Tell us|Write us] the code of your door so that we can [mend|clean] the {o}.",
        "[I am|We are] [only passing through|new at the {p}]. [Who in your house|Which neighbour] is away on {d}, and where is the key?",
        "Your {k} {y} is in trouble at the {p2} and cannot write. [Give|Hand] {m} coins to the man at the {p} and do not tell the family.",
        "[Thank you for your order|Your order is ready]. The {o} costs {m} coins more than you paid, so [bring|hand] us the rest and your bank letter at the {p}.",
        "[It worked for me|I did it too]: {m} coins to the man at the {p} on {d}, and a week later he brings back twice as much. Try it.",
        "A rich man [at the {p}|over the sea] wants to give you his {o}. He only needs the name of your bank and {m} coins for the letter.",
    ],
    "ham": [  # trigger words, digits, links, capitals: nothing is wanted
        "[FREE|Free] soup at the {p} on {d}! [Nothing to pay|Everybody is welcome], {x}.",
        "We WON! {n} to {m2}! {y} [scored|shot] the last goal at the {p}!!!",
        "Congratulations on the prize for your {an}, {x}! [You earned it|We are proud]. Cake at the {p}!",
        "The menu of the {p} is at {link}. I am free on {d}, are you?",
        "You left {n} coins and your key at the {p}. {y} keeps them for you, come and get them.",
        "I owe you {n} coins for the {o}. I will pay you on {d} at the {p}.",
        "Careful: a letter from the {firm} says that we won {prize}. It is a trick, {y} says, so throw it away.",
        "A man at the {p} asked me for {m} coins and promised to bring back twice as much. I did not try it.",
        "Somebody wanted the code of my door so that they could mend the {o}. I told {y} [about it|that it was a trick].",
        "I lost my purse on the road, but {y} found it and left it under the bench at the {p}. All {m} coins were in it.",
        "Last chance for cake! {y} and the children have eaten nearly all of it. We are at the {p} until {d}.",
        "Your order is ready: {m} {fs} and a {o}. You paid last week, so just come to the {p} before {d}.",
        "URGENT: {y} needs the {o} at the {p} [now|today]. Can you win some time, {x}?",
    ],
}


def pair_of(rng: random.Random, label: str, slots: dict[str, str]) -> str:
    """Messages whose words are the same for both labels: only who is to do what tells them apart."""
    bad = expand(
        rng,
        "[send {m} coins to the {firm} for {prize}|give the code of your door to the {firm}|leave {m} coins for the {firm} at the {p}]",
        **slots,
    )
    good = expand(
        rng,
        "[bring the {o} to the {p2}|give the {o2} back to {y}|leave {m2} {fs} for the {an}|fetch the {o} from the {p2}]",
        **slots,
    )
    mine, yours = (good, bad) if label == "spam" else (bad, good)
    other = slots["x"]
    kind = rng.choice(("ask", "ask", "instead", "known", "fee", "offer"))
    if kind == "ask":
        you, he = rng.choice(
            (
                (f"I ask you to {yours}", f"I ask {other} to {mine}"),
                (f"you are to {yours}", f"{other} is to {mine}"),
                (f"you have to {yours}", f"{other} has to {mine}"),
                (f"it is for you to {yours}", f"it is for {other} to {mine}"),
            )
        )
        return join(rng, you, he)
    if kind == "instead":
        return rng.choice(
            (
                f"Do not {mine}, but {yours}.",
                f"You should {yours} and not {mine}.",
                f"Instead of what {other} says, which is to {mine}, please {yours}.",
                f"It is good to {yours} and bad to {mine}.",
                f"It is bad to {mine} and good to {yours}.",
            )
        )
    if kind == "known":
        me, he = ("me", other) if label == "ham" else (other, "me")
        known, unknown = (
            f"you [know|have known] {me} [from school|for years|since the {slots['p']}]",
            f"you have never [met|seen] {he}",
        )
        known, unknown = expand(rng, known), expand(rng, unknown)
        return join(rng, known, unknown) + expand(
            rng,
            " [Can|Will] you [please |][lend|bring|send] me {m} coins [for the {o}|on {d}|at the {p2}]?",
            **slots,
        )
    if kind == "fee":
        prize, cake = f"the fee for {slots['prize']} at the {slots['firm']}", f"the {slots['fs']} for {slots['y']}"
        mine, yours = (cake, prize) if label == "spam" else (prize, cake)
        return join(rng, f"you pay {yours}", f"I pay {mine}")
    firm, friend = f"the {slots['firm']}", f"{slots['x']}"
    trust, drop = (firm, friend) if label == "spam" else (friend, firm)
    yes, no = rng.choice(
        (
            (f"say yes to {trust}", f"say no to {drop}"),
            (f"trust {trust}", f"forget {drop}"),
            (f"take the offer of {trust}", f"turn down the offer of {drop}"),
        )
    )
    return join(rng, yes, no) + expand(
        rng, " [It is about {m} coins|They both have {prize}|Both wrote to you about the {o}].", **slots
    )


def join(rng: random.Random, first: str, second: str) -> str:
    if rng.random() < 0.5:
        first, second = second, first
    return capital(rng.choice((f"{first}, and {second}.", f"{first}. {capital(second)}.", f"{first}; {second}.")))


def message(rng: random.Random, label: str) -> str:
    x, y, z = rng.sample(PEOPLE, 3)
    o, o2 = rng.sample(OBJECTS, 2)
    p, p2 = rng.sample(PLACES, 2)
    firm = rng.choice(FIRMS)
    word = rng.choice((firm.replace(" ", "").lower(), p)) if label == "spam" else p
    slots = {
        "x": x, "y": y, "o": o, "o2": o2, "p": p, "p2": p2, "firm": firm, "prize": rng.choice(PRIZES),
        "n": str(rng.randint(3, 90)), "m": NUMBERS[rng.randint(3, 12)], "m2": NUMBERS[rng.randint(2, 9)], "k": rng.choice(KIN_OF[y in WOMEN]),
        "d": rng.choice(DAYS), "w": rng.choice(sorted(WEATHER)), "f": rng.choice(FOODS), "fs": plural(rng.choice(FOODS)),
        "an": rng.choice(ANIMALS), "link": f"www.{word}.example",
    }  # fmt: skip
    kind = rng.random()
    if kind < 0.25:
        body = pair_of(rng, label, slots)
        return expand(
            rng,
            "[Hello. |Good morning. |Dear neighbour. ||]{body}[ Thank you.| Until {d}.| {z}||]",
            body=body,
            d=slots["d"],
            z=z,
        )
    return expand(rng, rng.choice((EASY if kind < 0.6 else TRICKY)[label]), **slots)


# ---- instructions ----------------------------------------------------------------------------------------------------

Pair = tuple[str, str, str]  # instruction, input, output


class Vocabulary:
    """Names and words of one pair. Train never has the held-out ones; val and test at times have only those."""

    def __init__(self, rng: random.Random, held: bool) -> None:
        self.names = sorted({*HELD_NAMES, *rng.sample(PEOPLE, 4)}) if held else without(PEOPLE, HELD_NAMES)
        pairs = HELD_OPPOSITES if held else without(OPPOSITES, HELD_OPPOSITES)
        self.opposites = [word for pair in pairs for word in pair]
        self.plurals = HELD_PLURALS if held else without(OBJECTS + FOODS + ANIMALS, HELD_PLURALS)
        self.velic = HELD_VELIC if held else without(sorted(VELIC_NOUNS), HELD_VELIC)


def without(words: Sequence[T], held: Sequence[T]) -> list[T]:
    return [word for word in words if word not in held]


def is_held_out(question: str) -> bool:
    """A fifth of all questions, whatever the seed: train never asks them, so that val and test ask nothing known."""
    return zlib.crc32(question.encode()) % 5 == 0


def question_pair(rng: random.Random, words: Vocabulary) -> Pair:
    world, told = small_world(rng, words.names, rng.randint(3, 4), 2, rng.choice((1, 1, 2)))
    question, answer = rng.choice(world.questions())
    return question, " ".join(told), answer


def tense_pair(rng: random.Random, words: Vocabulary) -> Pair:
    now, then = plain_event(rng, words.names)
    return rng.choice(("Rewrite the sentence in the past.", "Tell it in the past.")), now, then


def swap_pair(rng: random.Random, words: Vocabulary) -> Pair:
    x, y = rng.sample(words.names, 2)
    verb, thing = rng.choice(("gave", "sold", "showed", "lent")), rng.choice(OBJECTS)
    text = rng.choice(("It was the other way round. Rewrite it.", "Rewrite it the other way round."))
    return text, f"{x} {verb} the {thing} to {y}.", f"{y} {verb} the {thing} to {x}."


def sorting_pair(rng: random.Random, words: Vocabulary) -> Pair:
    if rng.random() < 0.5:
        chosen = alphabet_words(rng, FOODS + ANIMALS, 3)
        return (
            rng.choice(("Sort the words by the alphabet.", "Put the words in alphabetical order.")),
            ", ".join(chosen),
            ", ".join(sorted(chosen)),
        )
    chain = rng.choice(SMALL_TO_LARGE)
    chosen = rng.sample(chain, 3)
    return (
        rng.choice(("Sort the words by size.", "Put the words in order by size.")),
        ", ".join(chosen),
        ", ".join(sorted(chosen, key=chain.index)),
    )


def opposite_pair(rng: random.Random, words: Vocabulary) -> Pair:
    word = rng.choice(words.opposites)
    if rng.random() < 0.5:
        thing = rng.choice(NOUNS_FOR[word])
        return (
            rng.choice(("Say the opposite.", "Rewrite it with the opposite.")),
            f"The {thing} is {word}.",
            f"The {thing} is {OPPOSITE[word]}.",
        )
    answer = f"The opposite of {word} is {OPPOSITE[word]}."
    return rng.choice(
        (
            (f"What is the opposite of {word}?", "", answer),
            ("What is the opposite?", word, answer),
            ("Give the opposite of the word.", word, answer),
        )
    )


def plural_pair(rng: random.Random, words: Vocabulary) -> Pair:
    noun = rng.choice(words.plurals)
    number = NUMBERS[rng.randint(2, 12)]
    answer = f"The plural of {noun} is {plural(noun)}."
    return rng.choice(
        (
            (f"Say it for {number}.", f"one {noun}", f"{number} {plural(noun)}"),
            (f"Say it for {number}.", f"one {noun}", f"{number} {plural(noun)}"),
            (f"What is the plural of {noun}?", "", answer),
            ("What is the plural?", noun, answer),
            ("Give the plural of the word.", noun, answer),
        )
    )


def counting_pair(rng: random.Random, words: Vocabulary) -> Pair:
    if rng.random() < 0.5:
        things = rng.sample(OBJECTS + FOODS, rng.randint(2, 5))
        return (
            rng.choice(("How many things are there?", "Count the things.")),
            listing([a(t) for t in things]),
            f"There are {NUMBERS[len(things)]} things.",
        )
    x, y = rng.sample(words.names, 2)
    food, start = rng.choice(FOODS), rng.randint(4, 9)
    n = rng.randint(1, start - 2)
    text = expand(
        rng,
        "{x} had {s}. [{y} bought {k} from {x}.|{x} sold {k} to {y}.|{x} gave {k} to {y}.]",
        x=x,
        y=y,
        s=counted(start, food),
        k=counted(n, food),
    )
    return f"How many {plural(food)} does {x} have now?", text, f"{x} has {counted(start - n, food)}."


def summary_pair(rng: random.Random, words: Vocabulary) -> Pair:
    while True:
        world, told = small_world(rng, words.names, rng.randint(3, 4), 2, 1)
        if len(world.gifts) == 1 and sum(world.gifts[0][1] in line for line in told) >= 2 and count_gifts(told) == 1:
            break
    giver, thing, receiver = world.gifts[0]
    return (
        rng.choice(("Sum up the story in one line.", "Tell the story in short.")),
        " ".join(told),
        f"{giver} gave the {thing} to {receiver}.",
    )


def count_gifts(told: Iterable[str]) -> int:
    return sum(bool(re.search(r"\b(gave|handed|passed)\b", line)) for line in told)


def velic_pair(rng: random.Random, words: Vocabulary) -> Pair:
    english, velic = velic_phrase(rng, rng.choice(words.velic))
    answer = f"In Velic {english} is {velic}."
    return rng.choice(
        (
            (f"What is {english} in Velic?", "", answer),
            ("Translate into Velic.", english, answer),
            ("Say it in Velic.", english, answer),
        )
    )


TASKS: dict[str, tuple[int, list[Callable[[random.Random, Vocabulary], Pair]]]] = {  # share, makers
    "question": (24, [question_pair]),
    "rewriting": (14, [tense_pair, swap_pair]),
    "sorting": (14, [sorting_pair]),
    "opposites": (9, [opposite_pair]),
    "plurals": (9, [plural_pair]),
    "counting": (14, [counting_pair]),
    "summary": (8, [summary_pair]),
    "translation": (8, [velic_pair]),
}

# ---- conversations ---------------------------------------------------------------------------------------------------


class Talk(NamedTuple):
    """Questions and answers in turn; the last answer needs what was said before."""

    turns: list[tuple[str, str]]
    asked: list[str]  # the questions in it that could stand alone


def alone(pair: Pair) -> tuple[tuple[str, str], str]:
    """Return a pair as a turn, and its whole question."""
    instruction, given, output = pair
    question = f"{instruction}\n{given}" if given else instruction
    return (question, output), question


def story_talk(rng: random.Random, words: Vocabulary) -> Talk:
    """Talk about a story that is told in the first turn only."""
    world, told = small_world(rng, words.names, 3, 2, 1)
    questions = rng.sample(world.questions(), min(len(world.questions()), rng.randint(2, 3)))
    (instruction, output), *more = questions
    first, asked = alone((instruction, " ".join(told), output))
    return Talk([first, *more], [asked])


def own_talk(rng: random.Random, words: Vocabulary) -> Talk:
    """Tell something of oneself, ask for something else, and ask for what was told."""
    name, thing, place = rng.choice(words.names), rng.choice(OBJECTS), rng.choice(PLACES)
    facts = [
        (f"I am {name}.", f"Good day, {name}.", "Who am I?", f"You are {name}."),
        (f"I have {a(thing)}.", f"That is a good {thing}.", "What do I have?", f"You have {a(thing)}."),
        (f"I live at the {place}.", f"I know the {place}.", "Where do I live?", f"You live at the {place}."),
    ]
    chosen = rng.sample(facts, rng.choice((1, 2)))
    turns = [(say, answer) for say, answer, _, _ in chosen]
    other, asked = alone(rng.choice((opposite_pair, plural_pair, velic_pair))(rng, words))
    _, _, question, answer = rng.choice(chosen)
    return Talk([*turns, other, (question, answer)], [asked])


def word_talk(rng: random.Random, words: Vocabulary) -> Talk:
    """Ask for two words alike: what is wanted of the second was said of the first alone."""
    kind = rng.choice(("plural", "velic", "adjective"))
    if kind == "plural":
        one, other = rng.sample(words.plurals, 2)
        first, *answers = f"What is the plural of {one}?", *(f"The plural of {n} is {plural(n)}." for n in (one, other))
    elif kind == "velic":
        one, other = rng.sample(words.velic, 2)
        first, *answers = f"What is {one} in Velic?", *(f"In Velic {n} is {VELIC_NOUNS[n]}." for n in (one, other))
    else:
        noun, (one, other) = rng.choice(words.velic), rng.sample(sorted(VELIC_ADJECTIVES), 2)
        first = f"What is {one} {noun} in Velic?"
        answers = [f"In Velic {a} {noun} is {VELIC_NOUNS[noun]} {VELIC_ADJECTIVES[a]}." for a in (one, other)]
    return Talk([(first, answers[0]), (f"And {other}?", answers[1])], [first])


def list_talk(rng: random.Random, words: Vocabulary) -> Talk:
    """Sort words, and ask for the first or the last of them."""
    first, asked = alone(sorting_pair(rng, words))
    listed = first[1].split(", ")
    ends = [
        ("Which one is first?", f"The first one is {listed[0]}."),
        ("Which one is last?", f"The last one is {listed[-1]}."),
    ]
    return Talk([first, *rng.sample(ends, rng.choice((1, 2)))], [asked])


def number_talk(rng: random.Random, words: Vocabulary) -> Talk:
    """Count goods, and count on from there."""
    x, y = rng.sample(words.names, 2)
    food, start = rng.choice(FOODS), rng.randint(5, 9)
    sold = rng.randint(1, start - 3)
    left = start - sold
    text = f"{x} had {counted(start, food)}. {x} gave {counted(sold, food)} to {y}."
    first, asked = alone((f"How many {plural(food)} does {x} have now?", text, f"{x} has {counted(left, food)}."))
    return Talk([first, (f"Then {x} gave one to {y}. And now?", f"{x} has {counted(left - 1, food)}.")], [asked])


def retold_talk(rng: random.Random, words: Vocabulary) -> Talk:
    """Rewrite a sentence, and rewrite the answer."""
    x, y = rng.sample(words.names, 2)
    verb, thing = rng.choice(sorted(VERBS)), rng.choice(OBJECTS + FOODS)
    now = f"{x} {verb} the {thing} to {y}."
    instruction = rng.choice(("Rewrite the sentence in the past.", "Tell it in the past."))
    first, asked = alone((instruction, now, f"{x} {VERBS[verb]} the {thing} to {y}."))
    return Talk([first, ("Now the other way round.", f"{y} {VERBS[verb]} the {thing} to {x}.")], [asked])


def again_talk(rng: random.Random, words: Vocabulary) -> Talk:
    """Have an answer said again."""
    maker = rng.choice((question_pair, counting_pair, velic_pair, swap_pair, opposite_pair))
    first, asked = alone(maker(rng, words))
    return Talk([first, (rng.choice(("Say that again.", "Once more, please.")), first[1])], [asked])


TALKS: dict[Callable[[random.Random, Vocabulary], Talk], int] = {  # shares
    story_talk: 3, own_talk: 3, word_talk: 2, list_talk: 2, number_talk: 1, retold_talk: 2, again_talk: 1,
}  # fmt: skip

# ---- files -----------------------------------------------------------------------------------------------------------


def key(text: str) -> str:
    """Texts that differ only in case, space and punctuation count as equal."""
    return "".join(char for char in text.casefold() if char.isalnum())


def make_stories(rng: random.Random) -> list[str]:
    facts = Facts(rng)
    seen: set[str] = set()
    stories: list[str] = []
    while len(stories) < STORIES:
        text = "\n".join(rng.choice(SCENES)(rng, facts))
        if key(text) not in seen:
            seen.add(key(text))
            stories.append(text)
    return stories


def make_messages(rng: random.Random, stories: str) -> list[dict[str, str]]:
    """New texts only: none stands twice, and none is in the stories."""
    seen: set[str] = set()
    told = key(stories)
    rows = []
    for split, count in MESSAGES.items():
        for i in range(count):
            label = "spam" if i % 2 else "ham"
            while key(text := message(rng, label)) in seen or key(text) in told:
                pass
            seen.add(key(text))
            rows.append({"text": text, "label": label, "split": split})
    return rows


def make_instructions(rng: random.Random) -> list[dict[str, str]]:
    seen: set[str] = set()
    sorted_in: dict[str, str] = {}  # split of each answer
    rows = []
    shares = sum(share for share, _ in TASKS.values())
    for split, count in INSTRUCTIONS.items():
        for task, (share, makers) in TASKS.items():
            made = tries = 0
            while made < count * share // shares and tries < 30 * count:
                tries += 1
                held = split != "train" and tries % HELD_EVERY == 0
                instruction, given, output = rng.choice(makers)(rng, Vocabulary(rng, held))
                pair = key(instruction + given)
                if pair in seen or is_held_out(pair) != (split != "train"):
                    continue
                if task == "sorting" and sorted_in.setdefault(output, split) != split:
                    continue  # the same words in another order are no new question
                seen.add(pair)
                made += 1
                rows.append(
                    {"instruction": instruction, "input": given, "output": output, "task": task, "split": split}
                )
    rng.shuffle(rows)
    return rows


def make_conversations(rng: random.Random) -> list[dict[str, object]]:
    """Conversations of two to four turns; train asks nothing that a pair or conversation of val and test asks."""
    seen: set[str] = set()
    rows: list[dict[str, object]] = []
    makers, shares = list(TALKS), list(TALKS.values())
    for split, count in CONVERSATIONS.items():
        made = tries = 0
        while made < count:
            tries += 1
            held = split != "train" and tries % HELD_EVERY == 0
            turns, asked = rng.choices(makers, shares)[0](rng, Vocabulary(rng, held))
            whole = key("\n".join(text for turn in turns for text in turn))
            if whole in seen or any(is_held_out(key(question)) != (split != "train") for question in asked):
                continue
            seen.add(whole)
            made += 1
            said = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            rows.append({"messages": said, "task": "conversation", "split": split})
    rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    stories = "\n\n\n".join(make_stories(random.Random(f"{SEED} stories"))) + "\n"
    (out / "stories.txt").write_text(stories, encoding="utf-8", newline="\n")
    write_rows(out / "messages.jsonl", make_messages(random.Random(f"{SEED} messages"), stories))
    write_rows(out / "instructions.jsonl", make_instructions(random.Random(f"{SEED} instructions")))
    write_rows(out / "conversations.jsonl", make_conversations(random.Random(f"{SEED} conversations")))


if __name__ == "__main__":
    main()
