"""Hugging Face's folders: read without running others' code, or refused in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt import GPT

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
IDX = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1))
WTE = "transformer.wte.weight"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["one file", "shards", "no head", "bfloat16"])
def test_every_form_has_their_logits(form, theirs, tmp_path):
    model = theirs.transformer if form == "no head" else theirs
    if form == "bfloat16":
        model = transformers.GPT2LMHeadModel(theirs.config).to(torch.bfloat16)
        model.load_state_dict(theirs.state_dict())
        theirs = transformers.GPT2LMHeadModel(theirs.config).eval()
        theirs.load_state_dict(model.float().state_dict())
        model.to(torch.bfloat16)
    model.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if form == "shards" else {}))
    assert (tmp_path / "model.safetensors").exists() != (form == "shards")
    ours = GPT.from_pretrained(str(tmp_path))
    torch.testing.assert_close(ours.logits(IDX), theirs(IDX).logits, rtol=0, atol=1e-5)


def test_nothing_that_a_config_asks_for_is_imported(folder, theirs):
    """transformers asked for the package of `_attn_implementation`, and imports an `auto_map`."""
    change(
        folder / "config.json", _attn_implementation="flash_attention_3",
        attn_implementation="someone/kernel", auto_map={"AutoConfig": "evil.Config"},
        torch_dtype="evil", dtype=3, architectures=["Evil"],
    )
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    ours = GPT.from_pretrained(str(folder))
    torch.testing.assert_close(ours.logits(IDX), theirs(IDX).logits, rtol=0, atol=1e-5)
    program = f"import sys; from gpt import GPT; GPT.from_pretrained({str(folder)!r}); "
    program += "assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_head": "4"}, "n_head='4'"),
        ({"n_head": 5}, "n_head=5 does not divide n_embd=16"),
        ({"n_head": None}, "n_head="),
        ({"n_embd": None}, "n_embd="),
        ({"n_embd": 10**30}, "its weights 16"),
        ({"n_layer": 3}, "n_layer=3, its weights 2"),
        ({"vocab_size": -1}, "vocab_size=-1, its weights 97"),
        ({"activation_function": None}, "activation"),
        ({"n_inner": "x"}, "inner width"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ],
)
def test_a_malformed_config_is_one_line(values, message, folder):
    change(folder / "config.json", **values)
    assert message in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"model_type": ' + "[" * 5000])
def test_a_config_that_is_no_object_is_one_line(text, folder):
    (folder / "config.json").write_text(text)
    assert "config.json: " in refusal(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (WTE, None, f"{WTE} is missing"),
        (WTE, torch.ones(97, 16).int(), "holds int32"),
        (WTE, torch.ones(97), "has 1 dimensions"),
        (WTE, torch.full((97, 16), float("nan")), "not finite"),
        ("extra", torch.ones(2), "'extra' is no parameter"),
        ("lm_head.weight", torch.ones(97, 16), "is not the embedding"),
        ("transformer.ln_f.weight", torch.ones(3), "is (3,); (16,) is needed"),
        ("transformer.h.1.mlp.c_fc.weight", torch.ones(64, 16), "(16, 64); (64, 16) is needed"),
        ("transformer.ln_f.weight", None, "is missing"),
    ],
)
def test_wrong_weights_are_one_line(name, tensor, message, folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(name, None)
    save_file(weights | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")
    assert message in refusal(folder)


def test_damaged_and_missing_files_are_one_line(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole + b"x", b"\xff" * 100):
        file.write_bytes(damaged)
        assert f"{file}: damaged" in refusal(folder)
    file.unlink()
    assert "no such file" in refusal(folder)
    os.mkfifo(file)
    assert "no regular file" in refusal(folder)
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "pytorch_model.bin, a pickle that may run code, is not read" in refusal(folder)
    for index in (
        "{}",
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../../model.safetensors"}}',
        '{"weight_map": {"a": ".."}}',
    ):
        (folder / "model.safetensors.index.json").write_text(index)
        refusal(folder)
