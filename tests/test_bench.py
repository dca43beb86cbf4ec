"""The contests at a tiny size: who takes part, what is counted, what the table says. No speed is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.__main__ import BENCH_SIZES, build_parser, main
from llm.bench.contest import OURS, compare, draw, markdown, of_limit
from llm.bench.contests import CONTESTS
from llm.bench.models import Shape, gpt2_config, transformers_gpt2
from llm.config import InputError
from llm.model import GPT

TINY = Shape(layers=2, width=16, heads=2, vocab=50, context=16, batch=2, prompt=4, new=4)


@pytest.mark.parametrize("kind", CONTESTS)
def test_all_that_are_installed_take_their_turns(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    found = compare(CONTESTS[kind], TINY, rounds=2, least=0.0, say=said.append)
    present = {"transformers", "transformers, static cache"} & set(CONTESTS[kind].contestants)
    assert set(found["results"]) >= {OURS} | present
    for name, result in found["results"].items():
        assert len(result["rates"]) == 2 and min(result["rates"]) > 0
        assert result["median"] == pytest.approx(sum(result["rates"]) / 2)
        assert result["memory"] > 100 * 2**20, "torch alone takes more"
        assert sum(f"{name}:" in line for line in said) == 2
    for name in set(CONTESTS[kind].contestants) - set(found["results"]):
        assert sum(line.startswith(f"{name}: left out, no package ") for line in said) == 1
    table = markdown(found)
    assert table.count("\n|") == 2 + len(found["results"]) and f"| {OURS} |" in table
    draw(found, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", CONTESTS)
def test_one_turn_counts_what_it_did(kind: str) -> None:
    expected = {"train": 2 * 16, "finetune": 2, "generate": 2 * 4}[kind]
    for name, make in CONTESTS[kind].contestants.items():
        try:
            turn = make(TINY)
        except ModuleNotFoundError:
            continue
        assert turn() == expected, name


def test_contestants_train_models_of_one_size() -> None:
    sizes = {
        "ours": sum(p.numel() for p in GPT(gpt2_config(TINY)).parameters()),
        "transformers": sum(p.numel() for p in transformers_gpt2(TINY).parameters()),
    }
    assert len(set(sizes.values())) == 1, sizes


def test_the_share_of_the_limit() -> None:
    """A layer of width 16 has 12 * 256 weights in its matrices; the vocabulary 50 * 16."""
    weights = 2 * 12 * 256 + 50 * 16
    train, generate = CONTESTS["train"].cost, CONTESTS["generate"].cost
    assert of_limit(train(TINY, OURS), 10.0, 1e6, 1e9) == pytest.approx(10 * 6 * (weights + 2 * 16 * 16) / 1e6)
    one = generate(TINY._replace(batch=1), OURS)
    assert of_limit(one, 10.0, 1e9, 1e6) == pytest.approx(10 * 4 * weights / 1e6)
    assert of_limit(generate(TINY, OURS), 10.0, 1e6, 1e6) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 3}, "width 16 must be a multiple of heads 3"),
        ({"new": 13}, "must fit into context 16"),
        ({"vocab": 10**8}, "vocab_size: input should be less than or equal to 16777216"),
    ],
)
def test_a_shape_that_no_model_has_is_one_line(changed: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(CONTESTS["train"], TINY._replace(**changed), 1, 0.01, print)


def test_the_command_line_knows_every_contest_and_size() -> None:
    """It names them itself, so that its help needs no torch."""
    for kind in CONTESTS:
        fields = CONTESTS[kind].sizes._fields
        args = build_parser().parse_args(["bench", kind, *(word for field in fields for word in (f"--{field}", "3"))])
        assert [getattr(args, field) for field in fields] == [3] * len(fields)
    assert set(BENCH_SIZES) == {field for contest in CONTESTS.values() for field in contest.sizes._fields}


@pytest.mark.parametrize("option", ["--rounds=0", "--batch=-1", "--seconds=soon"])
def test_a_wrong_number_is_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "train", option])
    assert ended.value.code == 2
    assert f"argument {option.split('=')[0]}: invalid" in capsys.readouterr().err


def test_only_those_named_take_part() -> None:
    found = compare(CONTESTS["finetune"], TINY, 1, 0.0, lambda line: None, only=[OURS])
    assert list(found["results"]) == [OURS]
    with pytest.raises(InputError, match="nobody: takes no part in finetune; those who do: this project, transformers"):
        compare(CONTESTS["finetune"], TINY, 1, 0.0, print, only=["nobody"])
