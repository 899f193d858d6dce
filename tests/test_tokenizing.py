"""The measurement of text preparation (bench/steps/tokenizing.py), on a small text."""

import json

import pytest

from bench.steps import tokenizing

pytest.importorskip("tiktoken", reason="tiktoken is not installed")


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 2000)
    return tokenizing.Options(text=str(text), megabytes=1, workers=1, repeats=1,
                              out=str(tmp_path / "out.json"))


def test_it_measures_both_on_the_same_text(options):
    tokenizing.main(options)
    result = json.loads(open(options.out).read())
    assert result["variants"].keys() == {"prepare", "tiktoken"}
    assert all(variant["megabytes_per_s"] > 0 for variant in result["variants"].values())


def test_wrong_ids_are_not_timed(options, monkeypatch):
    monkeypatch.setattr(tokenizing, "END_OF_TEXT", 0)
    with pytest.raises(ValueError, match="not tiktoken's; not timed"):
        tokenizing.main(options)
