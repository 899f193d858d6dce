"""Models that predict the previous token: in everything forward models of the reversed arrays."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.tokens import Reversed, check_vocabulary, header_of, open_split
from gpt import GPT, GPTConfig, sample
from gpt.generate import generate
from gpt.run_folder import find_checkpoint
from tests.conftest import every_architecture
from tests.numerics import stirred
from train import build, loop, run
from train.command_line import parse

CONFIG = GPTConfig(block_size=8, vocab_size=19, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def both(tiny_flags, tiny_data, tmp_path):
    """The flags of a backward run, and of a forward run on the same arrays reversed."""
    turned = tmp_path / "turned"
    turned.mkdir()
    for split in ("train", "val"):
        np.fromfile(tiny_data / f"{split}.bin", np.uint16)[::-1].tofile(turned / f"{split}.bin")
    (turned / "meta.json").write_text((tiny_data / "meta.json").read_text())
    base = [f for f in tiny_flags if "_dir=" not in f]
    return ([*base, f"--data_dir={tiny_data}", f"--out_dir={tmp_path / 'tiny-bw-adamw-1337'}",
             "--direction=backward"],
            [*base, f"--data_dir={turned}", f"--out_dir={tmp_path / 'turned-fw-adamw-1337'}"])


def directory(flags):
    return next(f for f in flags if f.startswith("--out_dir=")).partition("=")[2]


def losses(flags):
    with open(f"{directory(flags)}/metrics.jsonl") as file:
        return [(e["iter"], e.get("loss"), e.get("val/loss")) for e in map(json.loads, file)]


@every_architecture
def test_a_backward_run_is_a_forward_run_on_reversed_arrays(both):
    """Every loss, weight and moment, bit for bit; a forward run on the same arrays differs."""
    backward, forward = both
    for flags in both:
        assert run.main(flags) == 0
    assert losses(backward) == losses(forward)
    for kind in ("model", "optimizer", "rng"):
        a, b = (load_file(find_checkpoint(directory(flags)) / f"{kind}.safetensors")
                for flags in both)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    plain = [f for f in backward if "--direction" not in f and "--out_dir" not in f]
    assert run.main([*plain, f"--out_dir={directory(backward)}-not"]) == 0
    assert losses([f"--out_dir={directory(backward)}-not"]) != losses(backward)


def test_resume_is_bit_equal_backward_and_keeps_its_direction(both, capsys):
    backward, forward = both
    for limit in (4, 12):
        assert run.main([*backward, f"--max_iters={limit}", "--init_from=auto"]) == 0
    assert run.main(forward) == 0
    a, b = (load_file(find_checkpoint(directory(flags)) / "model.safetensors") for flags in both)
    assert all(torch.equal(a[k], b[k]) for k in a)
    unsaid = [f for f in backward if "--direction" not in f]
    assert build.build(parse([*unsaid, "--init_from=resume"])).config.model.direction == "backward"
    capsys.readouterr()
    assert run.main([*forward, "--init_from=resume", "--direction=backward"]) == 2
    assert "direction is forward there and backward here" in capsys.readouterr().err


@every_architecture
def test_it_predicts_the_token_before_from_those_after(tiny_flags, tiny_data):
    """Targets stand one place to the left of their inputs in the file."""
    built = build.build(parse([*tiny_flags, "--direction=backward"]))
    text = np.fromfile(tiny_data / "train.bin", np.uint16).tobytes()
    for inputs, targets in zip(*next(built.batches), strict=True):
        window = torch.cat([inputs, targets[-1:]]).flip(0).numpy().astype(np.uint16)
        assert window.tobytes() in text
        assert torch.equal(targets[:-1], inputs[1:])


@every_architecture
def test_both_ways_are_learnt_about_as_well(tiny_flags, tmp_path):
    """By the chain rule both directions have the same entropy: losses within 0.1 of each other."""
    final = []
    for direction in ("forward", "backward"):
        flags = [*tiny_flags, f"--direction={direction}", "--max_iters=60", "--lr_decay_iters=60",
                 "--dropout=0"]
        built = build.build(parse([*flags, f"--out_dir={tmp_path / direction}"]))
        for _ in range(60):
            loop.train_step(built, lr=1e-2)
        final.append(loop.evaluate(built)["val"])
    assert max(final) < 1.2 and abs(final[0] - final[1]) < 0.1


@every_architecture
@pytest.mark.parametrize("length", [3, 8, 20])
@pytest.mark.parametrize("options", [
    {"top_k": 1}, {}, {"top_k": 5, "top_p": 0.9, "temperature": 0.7},
])
def test_samples_are_the_forward_models_reversed(length, options, architecture):
    torch.manual_seed(0)
    forward, backward = (GPT(replace(CONFIG, direction=direction, architecture=architecture))
                         for direction in ("forward", "backward"))
    stirred(forward)
    backward.load_state_dict(forward.state_dict())
    idx = torch.randint(19, (2, length))
    texts = []
    for model, prompt in ((forward, idx.flip(1)), (backward, idx)):
        torch.manual_seed(1)
        texts.append(model.generate(prompt, 15, **options))
    assert torch.equal(texts[1], texts[0].flip(1))
    assert torch.equal(texts[1][:, 15:], idx)
    cached, plain = (torch.cat(list(generate(backward, idx, 15, top_k=1, cached=c)), 1)
                     for c in (True, False))
    assert torch.equal(cached, plain)


@every_architecture
def test_logits_are_the_forward_models_on_reversed_windows(both, tmp_path):
    """Two trained models, each reading its own file: the same logits, bit for bit."""
    logits = []
    for flags in both:
        assert run.main(flags) == 0
        batch, _ = next(build.build(parse([*flags, "--init_from=resume"])).batches)
        logits.append(GPT.from_checkpoint(directory(flags)).logits(batch))
    assert torch.equal(*logits)


@every_architecture
def test_sampled_text_grows_to_the_left(both, capsys):
    """The prompt is the ending; sample.py learns it from the checkpoint."""
    texts = []
    for flags, prompt in zip(both, ("abcx", "xcba"), strict=True):
        assert run.main([*flags, "--max_iters=4"]) == 0
        capsys.readouterr()
        assert sample.main([f"--out_dir={directory(flags)}", f"--start={prompt}",
                            "--num_samples=2", "--max_new_tokens=30"]) == 0
        texts.append([part.removesuffix("\n")
                      for part in capsys.readouterr().out.split("---------------\n")[:2]])
    backward, forward = texts
    assert backward[0].endswith("abcx") and len(backward[0]) == 34
    assert backward == [text[::-1] for text in forward]


def test_reversed_tokens_are_the_array_reversed(tmp_path):
    """Across shards, and checked as the others are."""
    ids = np.arange(100, dtype=np.uint16)
    for n, part in enumerate((ids[:30], ids[30:37], ids[37:])):
        (tmp_path / f"train_{n}.bin").write_bytes(header_of(len(part)) + part.tobytes())
    tokens = Reversed(open_split(tmp_path, "train").paths)
    windows = tokens.read(np.array([0, 1, 60, 90]), 10)
    assert np.array_equal(windows, [ids[::-1][s : s + 10] for s in (0, 1, 60, 90)])
    assert np.array_equal(np.concatenate(list(tokens.chunks())), ids[::-1])
    with pytest.raises(ValueError, match="no window of 10 tokens"):
        tokens.read(np.array([91]), 10)
    with pytest.raises(ValueError, match="holds the id 99"):
        check_vocabulary(tokens, 99)
