"""A model's vocabulary: its padding, its tokenizer, and the data that may train it further."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.tokenizer import write_meta
from gpt import GPT, GPTConfig, export, nanogpt, predict, sample
from gpt.checkpoint_files import read_config
from gpt.pretrained import read_source, tokenizer_of
from gpt.run_folder import find_checkpoint
from train import build, evaluate, run
from train.command_line import load_file, parse
from train.init_from import InitFrom, complete

FEW = [
    "--n_layer=1", "--n_embd=8", "--n_head=1", "--max_iters=2", "--eval_interval=2",
    "--eval_iters=1", "--gradient_accumulation_steps=1", "--batch_size=2",
]


@pytest.fixture
def gpt2_data(tmp_path):
    """Ids of GPT-2 with the meta.json that our prepare.py writes."""
    folder = tmp_path / "words"
    folder.mkdir()
    for split, n in (("train", 2000), ("val", 400)):
        ids = np.random.default_rng(0).integers(50257, size=n)
        ids.astype(np.uint16).tofile(folder / f"{split}.bin")
    write_meta(folder, "gpt2", 50257)
    return folder


@pytest.mark.parametrize(
    ("meta", "rows"),
    [
        (None, 50304),
        ({"kind": "gpt2", "vocab_size": 50257}, 50304),
        ({"kind": "char", "vocab_size": 65}, 65),
    ],
)
def test_gpt2s_vocabulary_is_padded(meta, rows):
    """The meta.json of our own prepare.py took the padding away: 50,257 rows, no multiple of 64."""
    config = load_file("train_gpt2")
    assert complete(config, InitFrom("scratch"), meta).model.vocab_size == rows
    asked = replace(config, model=replace(config.model, vocab_size=50257))
    assert complete(asked, InitFrom("scratch"), meta).model.vocab_size == 50257


def test_padding_is_never_text(gpt2_data, tiny_flags, tmp_path, capsys):
    """A model of 50,304 rows predicts, samples and exports to Hugging Face only 50,257 ids."""
    out = tmp_path / "out"
    assert run.main([*tiny_flags, f"--data_dir={gpt2_data}", *FEW]) == 0
    assert read_config(find_checkpoint(out)).vocab_size == 50304
    capsys.readouterr()
    assert predict.main([f"--out_dir={out}", "--text=a b", "--top=60000", "--device=cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 50257
    assert sample.main([f"--out_dir={out}", "--top_k=0", "--temperature=1e6", "--num_samples=1",
                        "--device=cpu"]) == 0
    assert evaluate.main([f"--out_dir={out}", f"--data_dir={gpt2_data}", "--device=cpu",
                          "--dtype=float32"]) == 0
    assert export.main([f"--out_dir={out}", "--to=nanogpt"]) == 0
    assert nanogpt.read(out / "nanogpt").config.vocab_size == 50304
    assert tokenizer_of(read_source(str(out / "nanogpt"))).vocab_size == 50257
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert export.main([f"--out_dir={out}", "--to=hf"]) == 0
    assert read_source(str(out / "hf")).config.vocab_size == 50257


def test_a_run_that_began_without_padding_goes_on_without(gpt2_data, tiny_flags, tmp_path):
    flags = [*tiny_flags, f"--data_dir={gpt2_data}", *FEW]
    assert run.main([*flags, "--vocab_size=50257"]) == 0
    assert build.build(parse([*flags, "--init_from=resume"])).model.config.vocab_size == 50257


def test_a_model_of_characters_is_handed_on_with_them(tiny_flags, tiny_data, tmp_path, capsys):
    """Its ckpt.pt said dataset=openwebtext: nanoGPT's sample.py took letters for GPT-2's tokens."""
    assert run.main([*tiny_flags, "--max_iters=4"]) == 0
    capsys.readouterr()
    assert export.main([f"--out_dir={tmp_path / 'out'}", "--to=nanogpt"]) == 0
    said = capsys.readouterr().out
    assert "copy its meta.pkl to data/tiny/meta.pkl in a checkout of nanoGPT" in said
    assert said.count("\n") == 2
    folder = tmp_path / "out" / "nanogpt"
    assert torch.load(folder / "ckpt.pt", weights_only=True)["config"]["dataset"] == "tiny"
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    chars = json.loads((tiny_data / "meta.json").read_text())["chars"]
    assert meta["vocab_size"] == 29 and meta["itos"] == dict(enumerate(chars))
    assert meta["stoi"] == {c: i for i, c in enumerate(chars)}
    flags = ["--start=abc", "--num_samples=1", "--max_new_tokens=9", "--device=cpu"]
    assert sample.main([f"--init_from={folder}", *flags]) == 0
    assert capsys.readouterr().out.startswith("abc")


def of_characters(folder, dataset):
    """A checkpoint of nanoGPT that says it was trained on data/DATASET."""
    folder.mkdir(parents=True)
    config = GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=16)
    weights = {name: p.detach() for name, p in GPT(config).named_parameters()}
    nanogpt.write(folder / "ckpt.pt", config, weights, {}, 3, 1.0, {"dataset": dataset})


@pytest.mark.parametrize("place", ["checkout/data/letters", "checkout/out"])
def test_sampling_finds_the_characters(place, tmp_path, capsys):
    """GPT-2's tokenizer was taken for every folder: an IndexError."""
    of_characters(tmp_path / "checkout" / "out", "letters")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    chars = "ABCDEFGHIJKLMNOPQRSTUVWXYZ .-"
    (tmp_path / place / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": 29, "itos": dict(enumerate(chars)), "stoi": {}})
    )
    flags = [
        f"--init_from={tmp_path / 'checkout' / 'out'}",
        "--start=ABC",
        "--num_samples=1",
        "--max_new_tokens=9",
        "--device=cpu",
    ]
    assert sample.main(flags) == 0
    assert capsys.readouterr().out.startswith("ABC")


@pytest.mark.parametrize(
    "dataset", ["letters", "nowhere", "..", "../letters", "", None, 3, "a" * 100]
)
def test_no_tokenizer_is_one_line(dataset, tmp_path, capsys):
    """Also where a data set of that name has other ids, and for names that lead elsewhere."""
    of_characters(tmp_path / "out", dataset)
    (tmp_path / "data" / "letters").mkdir(parents=True)
    write_meta(tmp_path / "data" / "letters", "char", 3, "abc")
    write_meta(tmp_path, "char", 29, "abcdefghijklmnopqrstuvwxyz .-")
    assert sample.main([f"--init_from={tmp_path / 'out'}", "--device=cpu"]) == 2
    err = capsys.readouterr().err
    assert "no tokenizer is known for its 29 ids; put the meta.pkl or meta.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("beginning", ["FOLDER", "resume"])
@pytest.mark.parametrize(
    "other",
    [
        ("char", 29, "zyxwvutsrqponmlkjihgfedcba\n ="),
        ("char", 3, "abc"),
        ("bytes", 256, ""),
        ("gpt2", 50257, ""),
    ],
)
def test_other_ids_are_not_trained_on(beginning, other, tiny_flags, tiny_data, tmp_path, capsys):
    """A model of letters was trained on any data without larger ids."""
    folder = tmp_path / "nano"
    of_characters(folder, "nowhere")
    write_meta(folder, "char", 29, "abcdefghijklmnopqrstuvwxyz\n =")
    flags = [
        *tiny_flags,
        f"--init_from={beginning.replace('FOLDER', str(folder))}",
        f"--resume_dir={folder}",
    ]
    write_meta(tiny_data, *other)
    assert run.main(flags) == 2
    err, theirs = capsys.readouterr().err, f"{other[1]:,} ids, of kind {other[0]}"
    assert f"{tiny_data} has another vocabulary ({theirs}) than {folder}" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "other",
    [("bytes", 256, ""), ("gpt2", 50257, ""), ("char", 30, "abcdefghijklmnopqrstuvwxyz0123")],
)
def test_nor_ids_of_another_number(other, tiny_flags, tiny_data, tmp_path, capsys):
    """If no file tells which characters the model was trained on."""
    of_characters(tmp_path / "nano", "nowhere")
    write_meta(tiny_data, *other)
    assert run.main([*tiny_flags, f"--init_from={tmp_path / 'nano'}"]) == 2
    assert f"has another vocabulary ({other[1]:,} ids" in capsys.readouterr().err


def test_the_same_characters_are_trained_on(tiny_flags, tiny_data, tmp_path):
    of_characters(tmp_path / "nano", "nowhere")
    write_meta(tmp_path / "nano", "char", 29, "abcdefghijklmnopqrstuvwxyz\n =")
    assert build.build(parse([*tiny_flags, f"--init_from={tmp_path / 'nano'}"])).step == 0
