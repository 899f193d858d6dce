import json

import pytest

from bench import report


def test_readme_is_what_the_results_say():
    """Run `python bench/report.py` after a new result."""
    assert report.main(report.Options(check=True)) == 0


def test_a_table_follows_its_result(tmp_path):
    environment = {"cpu": "X", "threads": 2, "gpu": None, "torch": "2", "python": "3", "commit": "0123456789", "date": "2026-01-01T",
                   "command": "bench/mfu.py"}
    step = {"median_ms": 10.0, "q1_ms": 9.0, "q3_ms": 11.0}
    variants = {"ours": {"dtype": "float32", "step": step, "tokens_per_s": 76_800.0},
                "nanoGPT": {"dtype": "float32", "step": step | {"median_ms": 15.0}, "tokens_per_s": 51_200.0}}
    (tmp_path / "mfu-cpu.json").write_text(json.dumps({"environment": environment, "cases": {"small": {"variants": variants}}}))
    text = report.filled("a\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nb\n<!-- bench:gpu -->\n<!-- /bench -->\n", tmp_path)
    assert "| small | ours | float32 | 10.0 (9.0 to 11.0) | 76,800 | 1.50 |" in text
    assert "commit 01234567" in text and "old" not in text and "gpu: not measured." in text
    assert report.filled(text, tmp_path) == text
    with pytest.raises(ValueError, match="bench:nonsense"):
        report.filled("<!-- bench:nonsense -->\n<!-- /bench -->", tmp_path)
