"""Write mails.csv and archive.txt, the same bytes on every run: invented mails to a shop for lamps, in two languages.

    python examples/mail/make_mails.py            # rewrites the files beside this script
    python examples/mail/make_mails.py --out DIR

mails.csv has a label for each mail, archive.txt has other mails of the same kinds without one. One in eight mails of test
says what it is about in a sentence that train and val do not have. Templates are small grammars: `[walked|ran]` chooses
one of its parts, `{a}` is filled in afterwards.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from pathlib import Path

SEED = 7
LABELLED = {"train": 50, "val": 8, "test": 17}  # mails of each label and language
UNLABELLED = 150  # likewise
NEW_IN_TEST = 7  # the one of the eight sentences in CORE that no mail of train or val has
ENGLISH, GERMAN = "en", "de"

NAMES = {
    ENGLISH: "Mary Allen|Tom Baker|Priya Nair|George Hill|Ellen Ward|Sam Okoro|Ruth Fields|Ben Carter|Joan Price|Liam Doyle",
    GERMAN: "Anna Vogt|Jens Kramer|Sabine Roth|Murat Aydin|Ute Lang|Karl Busch|Lea Winter|Paul Hauser|Ines Berg|Otto Kern",
}
WORDS = {
    ENGLISH: {
        "lamp": "desk lamp|floor lamp|bedside lamp|garden lantern|reading light|wall light|table lamp|ceiling light",
        "part": "shade|switch|cable|base|plug|glass|arm",
        "colour": "green|white|black|brass|blue|grey",
        "day": "Monday|Tuesday|Wednesday|Thursday|Friday|last week|two weeks ago|the 3rd of May|yesterday",
        "number": "two|three|four|six|ten",
        "place": "office|kitchen|bedroom|hallway|shop|studio",
    },
    GERMAN: {
        "lamp": "Schreibtischlampe|Stehlampe|Nachttischlampe|Gartenlaterne|Leselampe|Wandlampe|Tischlampe|Deckenleuchte",
        "part": "Schirm|Schalter|Stecker|Fuß|Arm|Rahmen",
        "colour": "Grün|Weiß|Schwarz|Messing|Blau|Grau",
        "day": "Montag|Dienstag|Mittwoch|Donnerstag|letzter Woche|dem 3. Mai|gestern|dem letzten Monat",
        "number": "zwei|drei|vier|sechs|zehn",
        "place": "das Büro|die Küche|das Schlafzimmer|den Flur|den Laden|das Atelier",
    },
}
# What a mail is about, label by label. Each label also speaks of what the others are about: an order with a question in
# it, a complaint that praises, a cancellation because something broke.
CORE = {
    ENGLISH: {
        "order": """I would like to [order|buy] {number} of your {lamp}s in {colour}.
            Please send [me|us] {number} {lamp}s, {colour} if you still have them.
            We need {number} more {lamp}s like those that we had from you on {day}.
            Put me down for one {lamp} in {colour}, [please|the large one].
            My old {lamp} broke after twenty years, so I am taking the new one in {colour}.
            [Yes, the price is fine|I have seen your list]. Send the {lamp} to the address below.
            Could you send {number} {lamp}s to our {place} and add the bill?
            Before I forget it again: one {lamp}, {colour}, delivered to the {place}.""",
        "question": """[Do you know|Can you tell me] whether the {lamp} is also made in {colour}?
            How long is the cable of the {lamp}, and does it have a {part} that can be replaced?
            Which bulb fits the {lamp}? The leaflet [is silent about it|does not say].
            I am not buying anything yet, but what would {number} {lamp}s cost for our {place}?
            Is your shop open on {day}? I want to look at the {lamp} in {colour}.
            Is it normal that the {part} gets warm, or should I worry?
            A friend returned her {lamp}. Until when would that be possible for one bought on {day}?
            When will the {lamp} in {colour} be back [in stock|on the shelves]?""",
        "complaint": """The {lamp} that came on {day} has a broken {part}.
            [Lovely lamp|A pretty thing], but the {part} came off on the first evening.
            I ordered {colour} and the {lamp} in the box is of another colour. [Again.|That is not good enough.]
            I have written to you {number} times about the {part} and nobody answers. Why?
            The {lamp} hums so loudly that nobody can work in the {place}.
            My order of {day} has still not arrived, and your telephone [rings without end|is always engaged].
            For this price I expected a {part} that lasts longer than a week.
            The {lamp} flickers. I do not want another voucher, I want one that works.""",
        "cancellation": """Please cancel my order for the {lamp}, I [no longer need it|have changed my mind].
            I am sending the {lamp} of {day} back [unopened|in its box]; please return the money.
            We ordered {number} {lamp}s on {day}. Do not send them, our {place} is closing.
            Stop the delivery of the {lamp} in {colour}, please. My husband had bought one already.
            I withdraw from the contract of {day} about the {lamp}.
            The {lamp} would come too late for us, so please take the order off your list.
            Nothing is wrong with the {lamp}, it is only too large for the {place}. How do I return it? Here is my account.
            Thank you for the friendly answer, but we will not take the {number} {lamp}s after all.""",
    },
    GERMAN: {
        "order": """Ich möchte gern {number} Mal die {lamp} in {colour} [bestellen|kaufen].
            Bitte [schicken|senden] Sie uns {number} Stück der {lamp}, wenn möglich in {colour}.
            Wir brauchen noch {number} Stück der {lamp}, so wie die von {day}.
            Merken Sie bitte eine {lamp} in {colour} für mich vor, [die große|ich zahle gleich].
            Meine alte {lamp} ist nach zwanzig Jahren kaputt, darum nehme ich nun die neue in {colour}.
            [Der Preis ist in Ordnung|Ihre Liste habe ich gesehen]. Die {lamp} bitte an die Adresse unten.
            Können Sie uns {number} Stück der {lamp} mit Rechnung schicken, für {place}?
            Ehe ich es wieder vergesse: einmal die {lamp}, {colour}, für {place}.""",
        "question": """[Wissen Sie|Können Sie mir sagen], ob es die {lamp} auch in {colour} gibt?
            Wie lang ist das Kabel der {lamp}, und kann man den {part} tauschen?
            Welche Birne passt in die {lamp}? Im Heft [steht davon nichts|finde ich es nicht].
            Ich bestelle noch nicht, aber was würden {number} Stück der {lamp} kosten, für {place}?
            Haben Sie am Samstag offen? Ich möchte mir die {lamp} in {colour} ansehen.
            Ist es normal, dass der {part} warm wird, oder muss ich mir Sorgen machen?
            Eine Freundin hat ihre {lamp} zurückgegeben. Bis wann ginge das bei einem Kauf von {day}?
            Wann ist die {lamp} in {colour} wieder [da|auf Lager]?""",
        "complaint": """An der {lamp} von {day} ist der {part} gebrochen.
            [Schöne Lampe|Hübsch ist sie ja], aber der {part} ist am ersten Abend abgefallen.
            Bestellt war {colour}, im Karton lag die {lamp} in einer anderen Farbe. [Schon wieder.|So geht das nicht.]
            Ich habe Ihnen {number} Mal wegen dem {part} geschrieben, und niemand antwortet. Warum?
            Die {lamp} brummt so laut, dass hier niemand arbeiten kann.
            Meine Bestellung von {day} ist noch immer nicht da, und am Telefon [ist niemand|läuft nur Musik].
            Für diesen Preis hätte ich einen {part} erwartet, der länger als eine Woche hält.
            Die {lamp} flackert. Ich will keinen Gutschein, ich will eine, die geht.""",
        "cancellation": """Bitte stornieren Sie meine Bestellung der {lamp}, ich [brauche sie nicht mehr|habe es mir anders überlegt].
            Die {lamp} von {day} schicke ich [ungeöffnet|im Karton] zurück; bitte erstatten Sie mir das Geld.
            Wir hatten {number} Stück der {lamp} bestellt. Bitte nicht mehr liefern, wir schließen.
            Halten Sie die Lieferung der {lamp} in {colour} bitte an. Mein Mann hatte schon eine gekauft.
            Ich trete vom Kauf der {lamp} von {day} zurück.
            Die {lamp} käme für uns zu spät, nehmen Sie den Auftrag bitte von Ihrer Liste.
            An der {lamp} fehlt nichts, sie ist nur zu groß für {place}. Wie gebe ich sie zurück? Hier ist mein Konto.
            Danke für die nette Antwort, aber wir nehmen die {number} Stück der {lamp} nun doch nicht.""",
    },
}
FRAME = {  # openings, sentences that say nothing of the matter, endings
    ENGLISH: (
        "Hello,|Dear Sir or Madam,|Good morning,|Hi there,|Dear team,|",
        """My customer number is {id}.|I found you through a neighbour.|We met at your shop on {day}.|You can reach me in
            the evening.|I hope you are well.|My sister has the same lamp in her {place}.|Order {id}.|It is for our
            {place}.|Your catalogue is very nicely made.|Sorry for the short note.||||""",
        "Best wishes, {name}|Regards, {name}|{name}|Thanks, {name}|Kind regards, {name}|Yours, {name}",
    ),
    GERMAN: (
        "Guten Tag,|Sehr geehrte Damen und Herren,|Hallo,|Liebes Team,|Guten Morgen,|",
        """Meine Kundennummer ist {id}.|Ein Nachbar hat Sie mir empfohlen.|Wir haben uns in Ihrem Laden gesehen.|Abends
            bin ich gut zu erreichen.|Ich hoffe, es geht Ihnen gut.|Meine Schwester hat die gleiche
            Lampe.|Auftrag {id}.|Sie ist für {place}.|Ihr Katalog ist sehr schön.|Verzeihen Sie die kurze Nachricht.||||""",
        "Viele Grüße, {name}|Mit freundlichen Grüßen, {name}|{name}|Danke, {name}|Beste Grüße, {name}|Ihr(e) {name}",
    ),
}
LABELS = list(CORE[ENGLISH])


def write_mail(rng: random.Random, language: str, label: str, split: str | None) -> str:
    """Return one mail, on one line."""
    opening, filler, ending = (rng.choice(" ".join(part.split()).split("|")) for part in FRAME[language])
    sentences = [" ".join(line.split()) for line in CORE[language][label].splitlines()]
    core = rng.choice(sentences[:NEW_IN_TEST] if split in ("train", "val") else sentences)
    middle = [core, filler] if rng.random() < 0.6 else [filler, core]
    text = " ".join(part for part in (opening, *middle, ending) if part)
    text = re.sub(r"\[(.*?)\]", lambda match: rng.choice(match[1].split("|")), text)
    words = {name: rng.choice(choices.split("|")) for name, choices in WORDS[language].items()}
    text = text.format(name=rng.choice(NAMES[language].split("|")), id=rng.randint(1000, 9999), **words)
    return with_slips(rng, text)


def with_slips(rng: random.Random, text: str) -> str:
    """Return the text as some people type: in lower case, or with two letters exchanged."""
    if rng.random() < 0.1:
        text = text.lower()
    if rng.random() < 0.15:
        at = rng.randrange(1, len(text) - 2)
        if text[at : at + 2].isalpha():
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text


def make_mails() -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """Return rows of text, label, language and split, and mails without a label; no text is in both."""
    rng = random.Random(SEED)
    seen: set[str] = set()

    def new(language: str, label: str, split: str | None) -> str:
        while (text := write_mail(rng, language, label, split)) in seen:
            pass
        seen.add(text)
        return text

    kinds = [(language, label) for language in (ENGLISH, GERMAN) for label in LABELS]
    rows = [
        (new(language, label, split), label, language, split)
        for split, n in LABELLED.items()
        for language, label in kinds
        for _ in range(n)
    ]
    archive = [new(language, label, None) for language, label in kinds for _ in range(UNLABELLED)]
    rng.shuffle(rows)
    rng.shuffle(archive)
    return rows, archive


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the example mails.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    rows, archive = make_mails()
    with (folder / "mails.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label", "language", "split"))
        writer.writerows(rows)
    (folder / "archive.txt").write_text("\n\n".join(archive) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
