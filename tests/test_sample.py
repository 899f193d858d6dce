"""gpt/sample.py: seeds, prompts, bad input, and the dtype of the weights."""

from types import SimpleNamespace

import pytest
import torch

from common import hardware
from gpt import sample
from tests.conftest import every_architecture
from train import run


@pytest.fixture
def trained(tiny_flags, tmp_path):
    assert run.main([*tiny_flags, "--max_iters=4"]) == 0
    return f"--out_dir={tmp_path / 'out'}"


def text(capsys, *argv):
    capsys.readouterr()
    assert sample.main(list(argv)) == 0
    return capsys.readouterr().out


@every_architecture
def test_same_seed_same_text(trained, capsys):
    flags = (trained, "--num_samples=2", "--max_new_tokens=30", "--start=abc")
    once = text(capsys, *flags)
    assert once == text(capsys, *flags) != text(capsys, *flags, "--seed=2")
    assert once.count("---------------\n") == 2 and once.count("abc") >= 2
    first, second = (part.strip("\n") for part in once.split("---------------\n")[:2])
    assert first != second and len(first) >= 30


@every_architecture
def test_greedy_needs_no_seed(trained, capsys):
    flags = (trained, "--num_samples=1", "--max_new_tokens=30", "--start=a")
    greedy = text(capsys, *flags, "--top_k=1")
    assert greedy == text(capsys, *flags, "--top_k=1", "--seed=5")
    assert greedy == text(capsys, *flags, "--temperature=0")
    assert greedy == text(capsys, *flags, "--top_p=0.0001")


def test_prompt_from_a_file_and_with_an_equals_sign(trained, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("xyz = a")
    from_file = text(capsys, trained, f"--start=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=1",
                     "--max_new_tokens=5")
    assert from_file.startswith("xyz = a")
    assert from_file == text(capsys, trained, "--start=xyz = a", "--num_samples=1",
                             "--max_new_tokens=5")


@pytest.mark.parametrize(("flags", "message"), [
    (["--start=A"], "'A'"),
    (["--start="], "prompt is empty"),
    (["--start=FILE:/nowhere/at/all"], "/nowhere/at/all"),
    (["--num_samples=0"], "num_samples=0"),
    (["--top_p=7"], "top_p=7.0"),
    (["--temperature=nan"], "temperature=nan"),
    (["--seed=18446744073709551616"], "seed="),
    (["--start=FILE:/"], "/: no regular file"),
    (["--start=FILE:/dev/zero"], "/dev/zero: no regular file"),
    (["--device=tpu"], "--device=tpu: choose"),
    (["--out_dir=/nowhere"], "/nowhere does not exist; train one"),
])
def test_bad_input_is_one_line(flags, message, trained, capsys):
    assert sample.main([trained, "--num_samples=1", "--max_new_tokens=3", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


@every_architecture
def test_the_prompt_may_be_longer_than_the_window(trained, capsys):
    assert "b" * 40 in text(capsys, trained, f"--start={'b' * 40}", "--num_samples=1",
                            "--max_new_tokens=4")


@pytest.mark.parametrize("units", [True, False])
def test_weights_of_a_large_model_are_bf16_where_that_is_faster(units, monkeypatch):
    """With a window of 100. Small models are fp32, and without units also one that shifts it."""
    def chosen(prompt, new, params=50_000_000, **flags):
        model = SimpleNamespace(num_params=lambda: params, config=SimpleNamespace(block_size=100),
                                lm_head=SimpleNamespace(weight=torch.zeros(1)))
        return sample.weights_dtype(sample.Sample(max_new_tokens=new, **flags), model, prompt)

    assert chosen(4, 50, params=30_000_000) == torch.float32
    automatic = torch.bfloat16 if units else torch.float32
    monkeypatch.setattr(hardware, "_automatic_on_a_cpu", lambda: automatic)
    assert chosen(4, 50, params=30_000_000) == torch.float32
    assert chosen(4, 50) == chosen(50, 50) == torch.bfloat16
    assert chosen(51, 50) == chosen(60, 40) == automatic
    assert chosen(4, 50, dtype="float32") == torch.float32
    assert chosen(4, 50, params=1, dtype="float16") == torch.float16
