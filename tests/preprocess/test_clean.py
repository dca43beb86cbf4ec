"""Cleaning of the corpus: each rule removes or changes what it names, and nothing else."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.common.errors import InputError
from llm.config import CleanParams
from llm.preprocess import clean, data_card, quality
from llm.preprocess.clean_corpus import SAMPLES, Funnel, clean_corpus, sentence
from llm.preprocess.mask import mask
from llm.preprocess.near_duplicates import find_near_duplicates, signature
from llm.preprocess.text import normalise
from llm.preprocess.workers import Workers
from tests.datasets import disguise, write_corpus
from tests.preprocess.pipeline import ALONE

OFF = CleanParams(repair=False, invisible=False, languages=[], quality=[], duplicates="none", mask=[])
PARAGRAPHS = {
    "en": "The weather in the mountains changed quickly, and the travellers who had left the village at dawn were "
    "glad when they saw the lights of the inn. They sat down by the fire and told each other about the long way.",
    "de": "Das Wetter in den Bergen schlug schnell um, und die Reisenden, die das Dorf am Morgen verlassen hatten, "
    "waren froh, als sie die Lichter des Gasthauses sahen. Sie setzten sich ans Feuer und erzählten vom langen Weg.",
    "fr": "Le temps changea vite dans les montagnes, et les voyageurs qui avaient quitté le village le matin furent "
    "heureux de voir les lumières de l'auberge. Ils s'assirent près du feu et parlèrent du long chemin parcouru.",
    "es": "El tiempo cambió rápidamente en las montañas, y los viajeros que habían salido del pueblo por la mañana se "
    "alegraron al ver las luces de la posada. Se sentaron junto al fuego y hablaron del largo camino recorrido.",
    "it": "Il tempo in montagna cambiò in fretta, e i viaggiatori che avevano lasciato il villaggio la mattina furono "
    "contenti di vedere le luci della locanda. Si sedettero accanto al fuoco e parlarono della lunga strada.",
    "nl": "Het weer in de bergen sloeg snel om, en de reizigers die het dorp in de ochtend hadden verlaten waren blij "
    "toen zij de lichten van de herberg zagen. Zij gingen bij het vuur zitten en vertelden over de lange weg.",
    "ru": "Погода в горах быстро переменилась, и путники, вышедшие утром из деревни, обрадовались, когда увидели огни "
    "постоялого двора. Они сели у огня и стали рассказывать друг другу о долгой дороге через перевал.",
    "pl": "Pogoda w górach szybko się zmieniła, a podróżni, którzy rano wyszli ze wsi, ucieszyli się na widok świateł "
    "gospody. Usiedli przy ogniu i zaczęli opowiadać sobie o długiej drodze, którą przeszli tego dnia.",
}  # fmt: skip


def cleaned(tmp_path: Path, texts: list[str], **rules: Any) -> tuple[list[str], Funnel]:
    path = write_corpus(tmp_path / "corpus.jsonl", texts)
    with tempfile.TemporaryDirectory(dir=tmp_path) as state:
        params = OFF.model_copy(update=rules)
        funnel = clean_corpus(path, tmp_path / "clean.jsonl", params, ALONE, Path(state))
    return [json.loads(line)["text"] for line in (tmp_path / "clean.jsonl").read_text().splitlines()], funnel


def test_every_rule_is_off_unless_named() -> None:
    assert not clean.is_on(OFF)
    rules = OFF.model_copy(update={"repair": True, "duplicates": "near", "quality": ["c4"], "mask": ["mail"]})
    assert clean.active_rules(rules) == ["repair", "c4", "exact", "near", "mask mail"]


def test_encoding_is_repaired(tmp_path: Path) -> None:
    pytest.importorskip("ftfy")
    texts = ["The cafÃ© is â€œopenâ€\x9d.", "A “quoted” &amp; whole ﬁne text."]
    found, funnel = cleaned(tmp_path, [texts[0].replace("\x9d", ""), texts[1]], repair=True)
    assert "café" in found[0] and found[1] == texts[1]
    assert funnel.changed == {"repair": 1}


@settings(max_examples=100)
@given(st.text(st.sampled_from("aé \n\tÃ©â€œ\x1b[m\u2028ﬁ\u3000"), max_size=60))
def test_lines_are_repaired_as_the_whole_text_would_be(text: str) -> None:
    ftfy, text = pytest.importorskip("ftfy"), normalise(text)
    kept = dict.fromkeys(("unescape_html", "uncurl_quotes", "fix_latin_ligatures", "fix_character_width"), False)
    assert clean.repair(text) == normalise(ftfy.fix_text(text, **kept))


def test_invisible_characters_go_and_joiners_with_a_meaning_stay(tmp_path: Path) -> None:
    kept = ["می\u200cخواهم", "क\u094d\u200dष", "👩\u200d👧", "🐈\u200d⬛", "plain"]
    found, funnel = cleaned(
        tmp_path, ["in\u200bvis\u2060i\u00adble \u202etext\u202c", "a\u200db", *kept], invisible=True
    )
    assert found == ["invisible text", "ab", *kept]
    assert funnel.changed == {"invisible": 2} and funnel.left == 7


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cf", "Cc", "Cs"])))
def test_a_text_without_invisible_characters_is_untouched(text: str) -> None:
    text = normalise(text)
    assert clean.INVISIBLE.sub("", text) == text


def test_texts_in_other_languages_are_removed(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    for wanted in (["en", "de"], ["ru"]):
        found, funnel = cleaned(tmp_path, list(PARAGRAPHS.values()), languages=wanted)
        assert found == [PARAGRAPHS[code] for code in PARAGRAPHS if code in wanted]
        assert funnel.removed == {"languages": len(PARAGRAPHS) - len(wanted)}
        assert len(funnel.samples["languages"]) == SAMPLES
    with pytest.raises(InputError, match=r"tokenize\.clean\.languages: 'xx' is not known \(expected some of"):
        cleaned(tmp_path, ["a"], languages=["xx"])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(InputError, match=r"tokenize\.clean\.repair: ftfy is missing; pip install 'textmill\[clean\]'"):
        cleaned(tmp_path, ["a"], repair=True)


GOOD = PARAGRAPHS["en"] + " " + PARAGRAPHS["en"].replace("mountains", "valley")


@pytest.mark.parametrize(
    "bad",
    [
        "Too few words.", "a b c d e f g h i j " * 10, "supercalifragilistic" * 3 + " " + "internationalisation " * 60,
        GOOD + " #" * 20, GOOD + " ..." * 20, "- point of a list with words\n" * 20, "And then it was over ...\n" * 20,
        "12 34 the and 56 78 90 " * 20, "The same line of words stands here and here.\n" * 10,
    ],
)  # fmt: skip
def test_gopher(bad: str) -> None:
    assert quality.gopher(GOOD, english=True) == GOOD
    assert quality.gopher(bad, english=True) is None
    german = f"{PARAGRAPHS['de']} {PARAGRAPHS['de']}"
    assert (quality.gopher(german, english=True), quality.gopher(german, english=False)) == (None, german)


def test_c4() -> None:
    page = "Home | About\nOne sentence is here.\nAnother one follows!\nPlease use JavaScript now.\n\nIs it the third?\n"
    assert quality.c4(page, True) == "One sentence is here.\nAnother one follows!\n\nIs it the third?"
    assert quality.c4("One line here.\nTwo lines here.", True) is None
    assert quality.c4("A b c. D e f. G h i. if (x) { y }", True) is None
    assert quality.c4(GOOD, True) == GOOD


def test_duplicates(tmp_path: Path) -> None:
    texts = ["one text", "One, text!", "a + b", "a - b", "two texts"]
    found, funnel = cleaned(tmp_path, texts, duplicates="exact")
    assert found == ["one text", "a + b", "a - b", "two texts"] and funnel.removed == {"exact": 1}


def test_near_duplicates_are_found_and_unrelated_texts_are_not(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    stories = (Path(__file__).parents[2] / "data/sample/stories.txt").read_text(encoding="utf-8").split("\n\n\n")
    chooser = random.Random(0)
    originals = [" ".join(chooser.sample(stories, 3)) for _ in range(100)]
    words = " ".join(stories).split()

    def change(text: str) -> str:
        parts = text.split()
        for i in chooser.sample(range(len(parts)), len(parts) // 10):
            parts[i] = chooser.choice(words)
        return " ".join(parts)

    def flagged(texts: list[str]) -> list[bool]:
        np.save(tmp_path / "signatures.npy", [signature(text) for text in texts])
        found: list[bool] = find_near_duplicates([tmp_path / "signatures.npy"], np.arange(len(texts))).tolist()
        return found

    found = flagged(originals + [change(text) for text in originals])
    assert sum(found[:100]) == 0 and sum(found[100:]) >= 95
    assert sum(flagged(stories[:1000])) < 10


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("mail", "Write to a.b+c@mail.example.org, please.", "Write to <mail>, please."),
        ("mail", "x @ y, @handle, a@b", "x @ y, @handle, a@b"),
        ("card", "Card 4111 1111 1111 1111, or 5500-0000-0000-0004.", "Card <card>, or <card>."),
        ("card", "No card: 4111 1111 1111 1112, 0000000000000000.", "No card: 4111 1111 1111 1112, 0000000000000000."),
        ("iban", "To DE89 3704 0044 0532 0130 00 TODAY or GB82WEST12345698765432.", "To <iban> TODAY or <iban>."),
        ("iban", "DE88 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        ("phone", "Call +49 30 1234567, (030) 123456-7 or 555-123-4567!", "Call <phone>, <phone> or <phone>!"),
        ("phone", "01.02.2020 12:30, 2020-01-02, 3.1415926", "01.02.2020 12:30, 2020-01-02, 3.1415926"),
    ],
)  # fmt: skip
def test_personal_data_is_masked(kind: str, text: str, expected: str) -> None:
    assert mask(text, kind) == expected


def test_accounts_and_cards_are_masked_before_phone_numbers(tmp_path: Path) -> None:
    texts = ["To DE89 3704 0044 0532 0130 00 today.", "Card 5500 0000 0000 0004, please call 0049 30 1234567."]
    found, funnel = cleaned(tmp_path, texts, mask=["phone", "card", "iban"])
    assert found == ["To <iban> today.", "Card <card>, please call <phone>."]
    assert funnel.changed == {"mask iban": 1, "mask card": 1, "mask phone": 1}


def test_the_funnel_is_drawn_and_its_samples_are_withheld(tmp_path: Path) -> None:
    texts = [GOOD, GOOD.upper(), "short", f"{PARAGRAPHS['en']} Write to me@here.org. {PARAGRAPHS['en'][::-1]}"]
    found, funnel = cleaned(tmp_path, texts, quality=["gopher"], duplicates="exact", mask=["mail"])
    assert len(found) == funnel.left == 2 and "me@here.org" not in found[1]
    assert funnel.removed == {"gopher": 1, "exact": 1, "mask mail": 0} and funnel.changed["mask mail"] == 1
    card = {"corpus": {"cleaning": funnel.card()}}
    table = "\n".join(data_card._cleaning(card["corpus"]))
    assert "| gopher | 0 | 1 | 3 | ███████████████ | short |" in table
    withheld = data_card.without_texts(card, ["corpus"])
    assert "samples" not in json.dumps(withheld) and "short" not in "\n".join(data_card._cleaning(withheld["corpus"]))
    assert sentence(funnel) == (
        "data.corpus: cleaning left 2 of 4 texts: 1 removed by gopher, 1 removed by exact, 1 changed by mask mail"
    )


def test_workers_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{PARAGRAPHS['en']} {number % 7}" for number in range(30)] + [disguise(PARAGRAPHS["en"] + " 1")]
    monkeypatch.setattr("llm.preprocess.corpus.BATCH_BYTES", 1000)
    found, funnel = cleaned(tmp_path, texts, duplicates="exact", mask=["mail"])
    first = (tmp_path / "clean.jsonl").read_bytes()
    assert len(found) == 7
    with Workers(2) as two:
        rules = OFF.model_copy(update={"duplicates": "exact", "mask": ["mail"]})
        corpus, out = tmp_path / "corpus.jsonl", tmp_path / "clean.jsonl"
        assert clean_corpus(corpus, out, rules, two, tmp_path / "state") == funnel
    assert (tmp_path / "clean.jsonl").read_bytes() == first
