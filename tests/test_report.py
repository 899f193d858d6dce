"""README's tables (bench/report.py)."""

import json

import pytest

from bench import report


def test_readme_is_what_the_results_say():
    """Run `python bench/report.py` after a new result."""
    assert report.main(report.Options(check=True)) == 0


ENVIRONMENT = {"cpu": "X", "threads": 2, "gpu": None, "torch": "2", "python": "3",
               "commit": "0123456789", "date": "2026-01-01T", "command": "bench/x.py"}
ON_A_GPU = ENVIRONMENT | {"gpu": {"name": "G"}}


def test_a_table_follows_its_result(tmp_path):
    step = {"median_ms": 10.0, "q1_ms": 9.0, "q3_ms": 11.0}
    variants = {"ours": {"dtype": "float32", "step": step, "tokens_per_s": 76_800.0},
                "nanoGPT": {"dtype": "float32", "step": step | {"median_ms": 15.0},
                            "tokens_per_s": 51_200.0}}
    (tmp_path / "mfu-cpu.json").write_text(
        json.dumps({"environment": ENVIRONMENT, "cases": {"small": {"variants": variants}}}))
    text = report.filled("a\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nb\n<!-- bench:gpu -->\n<!-- "
                         "/bench -->\n", tmp_path)
    assert "| small | ours | float32 | 10.0 (9.0 to 11.0) | 76,800 | 1.50 |" in text
    assert "commit 01234567" in text and "old" not in text and "gpu: not measured." in text
    assert report.filled(text, tmp_path) == text
    with pytest.raises(ValueError, match="bench:nonsense"):
        report.filled("<!-- bench:nonsense -->\n<!-- /bench -->", tmp_path)


def test_operators_with_their_share_of_the_floor():
    timing = {"median_ms": 2.0}
    matmul = {"timing": timing, "tflops": 123.0, "gbs": None, "of_floor": 0.5}
    bytes_ = {"timing": timing, "tflops": None, "gbs": 3000.0, "of_floor": 0.75}
    found = {
        "attention": {"floor": {"backward": {}}, "variants": {
            "ours": {"forward": matmul, "backward": None, "both": None}}},
        "loss": {"floor": {"backward": None}, "variants": {
            "ours": {"forward": bytes_, "backward": bytes_, "both": bytes_}}}}
    rates = {"copy_gbs": 4000.0, "matmul_tflops": 700.0}
    text = report.operators({"environment": ON_A_GPU, "rates": rates, "cases": found})
    assert "| attention | ours | 2 | 123 TFLOP/s | 50% | refused |  |  |" in text
    assert "| loss | ours | 2 | 3,000 GB/s | 75% | both: 2 | 3,000 GB/s | 75% |" in text
    assert "copy at 4,000 GB/s" in text and "on G;" in text


def test_parity_and_memory_tables():
    runs = {"torch": {"val_loss": 4.0, "tokens_per_s": 1000.0},
            "triton": {"val_loss": 4.001, "tokens_per_s": 1200.0}}
    text = report.parity({"environment": ON_A_GPU, "steps": 200, "corpus": "text",
                          "backends": runs,
                          "against": {"triton": {"mean": 0.001, "most": 0.01, "val": 0.001}}})
    assert "| torch | 4.0000 | | | 1,000 |" in text
    assert "| triton | 4.0010 | 0.001 | 0.01 | 1,200 |" in text
    peaks = {"torch": {"1": 2**30}, "triton": {"1": 2**30, "2": 2**31}}
    text = report.memory({"environment": ON_A_GPU, "case": "124M", "config": {"block_size": 1024},
                          "backends": {name: {"peak_bytes": peak} for name, peak in peaks.items()}})
    assert "| torch | 1.0 | does not fit |" in text and "| triton | 1.0 | 2.0 |" in text
