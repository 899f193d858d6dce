"""nanochat in transformers and here: the same function, read and written; what is refused.

All on the CPU in fp32, on as many threads as pytest has.
"""

import json
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt import GPT, GPTConfig, export, huggingface, sample
from gpt.checkpoint_files import read_config
from gpt.config import ARCHITECTURES
from gpt.generate import generate
from gpt.kv_cache import KVCache
from gpt.nanochat import relu_squared
from gpt.pretrained import read_source
from gpt.run_folder import find_checkpoint
from train import build, run
from train.command_line import parse

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
close = partial(torch.testing.assert_close, rtol=0, atol=2e-5)
IDX = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
KINDS = [(tied, cap, theta) for tied in (False, True) for cap, theta in
         ((15.0, 10_000.0), (0.0, 10_000.0), (2.0, 100.0), (30.0, 1e6))]
over_kinds = pytest.mark.parametrize(("tied", "cap", "theta"), KINDS)
THETA = {"rope_type": "default", "rope_theta": 1e4}


def randomised(model):
    """Weights large enough that every part of the model shows in its logits."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def model_of_theirs(**changes):
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=24, bos_token_id=60,
                 eos_token_id=60, pad_token_id=None)
    config = transformers.NanoChatConfig(**sizes | changes)
    return randomised(transformers.NanoChatForCausalLM(config))


def model_of_ours(**changes):
    sizes = dict(vocab_size=64, block_size=24, n_layer=2, n_head=4, n_embd=32)
    return randomised(GPT(GPTConfig(architecture="nanochat", **sizes | changes)))


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanochat") / "hf"
    model_of_theirs().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` to damage."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# -- the same function ------------------------------------------------------------------


@over_kinds
def test_a_folder_of_theirs_is_the_same_function(tied, cap, theta, tmp_path):
    theirs = model_of_theirs(tie_word_embeddings=tied, final_logit_softcapping=cap or None,
                             rope_parameters={"rope_type": "default", "rope_theta": theta})
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert (ours.config.tied, ours.config.logit_cap, ours.config.rope_theta) == (tied, cap, theta)
    with torch.no_grad():
        close(ours.logits(IDX), theirs(IDX).logits)
        loss = ours(IDX[:, :-1].contiguous(), IDX[:, 1:].contiguous())
        close(loss, theirs(IDX, labels=IDX).loss)


@over_kinds
def test_a_folder_of_ours_is_the_same_function(tied, cap, theta, tmp_path):
    """64 rows of vocabulary, of which 3 are padding."""
    ours = model_of_ours(tie_weights=tied, logit_cap=cap, rope_theta=theta)
    huggingface.write(ours, tmp_path, 61)
    theirs, again = loaded(tmp_path), GPT.from_pretrained(str(tmp_path))
    with torch.no_grad():
        close(theirs(IDX).logits, ours.logits(IDX)[..., :61])
        close(again(IDX[:, :-1].contiguous(), IDX[:, 1:].contiguous()),
              theirs(IDX, labels=IDX).loss)
    told = asdict(ours.config) | {"vocab_size": 61, "tie_weights": tied}
    assert asdict(again.config) == told
    for (name, a), b in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a[:61] if name.endswith(("wte.weight", "head.weight")) else a, b)


@pytest.mark.parametrize("tied", [False, True])
def test_the_greedy_text_is_the_same_with_and_without_a_cache(tied, tmp_path):
    ours = model_of_ours(tie_weights=tied)
    huggingface.write(ours, tmp_path, 61)
    theirs, prompt = loaded(tmp_path), IDX[:, :5]
    texts = []
    for cached in (True, False):
        new = generate(ours, prompt, 19, temperature=0, cached=cached, n_tokens=61)
        texts.append(torch.cat([prompt, *new], dim=1))
        texts.append(theirs.generate(prompt, max_new_tokens=19, do_sample=False, use_cache=cached,
                                     eos_token_id=None))
    assert all(torch.equal(a, b) for a, b in pairwise(texts))
    assert len(texts[0][:, 5:].unique()) > 4  # not one token over and over


@pytest.mark.parametrize("form", ["shards", "no head", "bfloat16", "before transformers 5"])
def test_every_form_has_their_logits(form, tmp_path):
    theirs = model_of_theirs(tie_word_embeddings=form == "no head")
    model = theirs.model if form == "no head" else theirs
    if form == "bfloat16":  # their buffer of frequencies is fp32 after loading, not after .to
        model = model_of_theirs().to(torch.bfloat16)
        theirs.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if form == "shards" else {}))
    if form == "before transformers 5":
        theirs = model_of_theirs(rope_parameters={"rope_type": "default", "rope_theta": 123.0})
        change(tmp_path, rope_parameters=None, rope_theta=123.0, rope_scaling=None)
    assert (tmp_path / "model.safetensors").exists() != (form == "shards")
    with torch.no_grad():
        close(GPT.from_pretrained(str(tmp_path)).logits(IDX), theirs(IDX).logits)


def test_the_special_tokens_are_ours(tmp_path):
    """NanoChatConfig's padding is token 1: it would not train there, and needs two tokens."""
    for vocab_size in (1, 61):
        huggingface.write(model_of_ours(), tmp_path / str(vocab_size), vocab_size)
        theirs = loaded(tmp_path / str(vocab_size))
        c, end = theirs.config, vocab_size - 1
        assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (end, end, None)
        assert theirs.model.embed_tokens.padding_idx is None


def test_the_cache_is_as_long_as_the_text(folder, monkeypatch):
    """A config.json beside 0.1 MB of weights asked for 0.5 GB of cache: 2^20 positions."""
    change(folder, max_position_embeddings=2**20)
    sizes = []

    def measured(config, *rest):
        sizes.append(config.block_size)
        return KVCache(config, *rest)

    monkeypatch.setattr("gpt.generate.KVCache", measured)
    GPT.from_pretrained(str(folder)).generate(IDX[:, :5], 3)
    assert sizes == [8]


def test_what_is_translated_is_an_architecture():
    assert huggingface.TRANSLATIONS.keys() <= ARCHITECTURES.keys()


# -- runs -------------------------------------------------------------------------------


@pytest.fixture
def nanochat_flags(tiny_flags):
    return [*tiny_flags, "--architecture=nanochat", "--kernels=torch"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_run_is_exported_and_goes_on(tied, nanochat_flags, tmp_path, capsys):
    out, hf = tmp_path / "out", tmp_path / "out" / "hf"
    assert run.main([*nanochat_flags, f"--tie_weights={tied}", "--rope_theta=500"]) == 0
    assert export.main([f"--out_dir={out}", "--to=hf"]) == 0
    theirs, ours = loaded(hf), GPT.from_checkpoint(out)
    idx = torch.arange(16)[None] % 29
    with torch.no_grad():
        assert ours.logits(idx).std() > 0.05  # trained: it began as a head of nearly 0
        close(theirs(idx).logits, ours.logits(idx))
        close(GPT.from_pretrained(str(hf)).logits(idx), ours.logits(idx))
    flags = ["--start=abc", "--num_samples=1", "--max_new_tokens=30", "--device=cpu",
             "--temperature=0"]
    texts = []
    for source in (f"--init_from={hf}", f"--out_dir={out}"):
        capsys.readouterr()
        assert sample.main([source, *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("abc")
    built = build.build(parse([*nanochat_flags, f"--init_from={hf}", "--block_size=8",
                               f"--out_dir={tmp_path / 'more'}"]))
    assert built.model.config.block_size == 8 and built.step == 0
    close(built.model.eval().logits(idx[:, :8]), ours.logits(idx[:, :8]))


def test_gpt2s_vocabulary_goes_without_its_padding(nanochat_flags, tmp_path):
    data, out = tmp_path / "ids", tmp_path / "out"
    data.mkdir()
    ids = (np.random.default_rng(0).zipf(1.3, 700) % 50257).astype(np.uint16)
    ids[:500].tofile(data / "train.bin")
    ids[500:].tofile(data / "val.bin")
    assert run.main([*nanochat_flags, f"--data_dir={data}", "--max_iters=2", "--eval_iters=1"]) == 0
    assert read_config(find_checkpoint(out)).vocab_size == 50304
    assert export.main([f"--out_dir={out}", "--to=hf"]) == 0
    assert read_source(str(out / "hf")).config.vocab_size == 50257
    idx = torch.randint(50257, (2, 16))
    with torch.no_grad():
        close(loaded(out / "hf")(idx).logits, GPT.from_checkpoint(out).logits(idx)[..., :50257])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "hf")
    assert tokenizer("Hello world, it's")["input_ids"] == [15496, 995, 11, 340, 338]
    assert tokenizer.decode([15496, 995]) == "Hello world"


def test_finetuning_starts_from_their_weights_and_learns(nanochat_flags, tmp_path):
    theirs = model_of_theirs(vocab_size=29, bos_token_id=28, eos_token_id=28)
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_meta.json").write_text((tmp_path / "tiny/meta.json").read_text())
    flags = [flag for flag in nanochat_flags if not flag.startswith(("--n_", "--arch"))]
    flags += [f"--init_from={tmp_path / 'hf'}", "--dropout=0", "--max_iters=20", "--decay_lr=False",
              "--eval_interval=10", "--log_interval=1", "--learning_rate=3e-3"]
    built = build.build(parse(flags))
    idx = IDX[:, :16] % 29
    close(built.model.logits(idx), theirs(idx).logits)
    assert run.main(flags) == 0
    log = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [e["train/loss"] for e in log if "train/loss" in e]
    assert losses[-1] < losses[0] - 0.5


# -- refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "to", "message"), [
    ([], "nanogpt", "architecture=nanochat, which --to=nanogpt cannot express"),
    (["--tie_weights=True"], "nanogpt", "architecture=nanochat, which --to=nanogpt cannot"),
    (["--window=8"], "hf", "window=8, which --to=hf cannot express"),
    (["--direction=backward"], "hf", "direction=backward, which --to=hf cannot express"),
])
def test_what_a_format_cannot_express_is_one_line(flags, to, message, nanochat_flags, tmp_path,
                                                  capsys):
    out = tmp_path / "out"
    assert run.main([*nanochat_flags, "--max_iters=1", *flags]) == 0
    capsys.readouterr()
    assert export.main([f"--out_dir={out}", f"--to={to}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (out / to).exists()
    assert export.main([f"--out_dir={out}", "--to=safetensors"]) == 0


@pytest.mark.parametrize(("values", "message"), [
    ({"num_key_value_heads": 2}, "num_key_value_heads=2, this trainer's nanochat has as many"),
    ({"num_key_value_heads": "4"}, "num_key_value_heads='4'"),
    ({"num_attention_heads": 5}, "num_key_value_heads=4"),
    ({"num_attention_heads": 5, "num_key_value_heads": None}, "n_head=5 does not divide"),
    ({"num_attention_heads": 32, "num_key_value_heads": 32}, "choose an even number"),
    ({"num_attention_heads": None}, "num_attention_heads=a NoneType; an int is needed"),
    ({"head_dim": 16}, "head_dim=16, this trainer's nanochat has hidden_size / num_att"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05, this trainer's nanochat has 1e-06"),
    ({"attention_bias": True}, "attention_bias=True, this trainer's nanochat has False"),
    ({"intermediate_size": 64}, "intermediate_size=64, this trainer's nanochat has 4 * hidden"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu', this trainer's nanochat has relu2"),
    ({"rope_parameters": THETA | {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"rope_parameters": "default"}, "rope_parameters='default'; an object is needed"),
    ({"rope_parameters": THETA | {"rope_theta": -1}}, "rope_theta=-1; a number above 0"),
    ({"rope_parameters": THETA | {"rope_theta": 10**400}}, "rope_theta=a int; a number above 0"),
    ({"final_logit_softcapping": 0}, "final_logit_softcapping=0; a number above 0"),
    ({"final_logit_softcapping": float("nan")}, "final_logit_softcapping=nan; a number above 0"),
    ({"max_position_embeddings": 10**30}, "block_size=1000"),
    ({"max_position_embeddings": 2**21}, "block_size=2097152: must be from 1 to 1048576"),
    ({"max_position_embeddings": 0}, "block_size=0: must be from 1"),
    ({"hidden_size": 64, "intermediate_size": 256}, "says hidden_size=64, its weights 32"),
    ({"num_hidden_layers": 3}, "config.json says num_hidden_layers=3, its weights 2"),
    ({"vocab_size": 10**12}, "config.json says vocab_size=1000000000000, its weights 61"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'; true or false is needed"),
    ({"quantization_config": {}}, "quantization_config=a dict"),
    ({"model_type": "llama"}, "model_type='llama', this trainer has gpt2, nanochat"),
    ({"model_type": ["nanochat"]}, "model_type=a list, this trainer has gpt2, nanochat"),
    ({"model_type": "gpt2", "tie_word_embeddings": True}, "transformer.wte.weight is missing"),
])
def test_another_kind_of_nanochat_is_one_line(values, message, folder, capsys):
    change(folder, **values)
    assert sample.main([f"--init_from={folder}", "--device=cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder}: ") and message in err and err.count("\n") == 1


def test_a_run_refuses_another_kind_in_one_line(folder, nanochat_flags, capsys):
    change(folder, num_key_value_heads=2)
    assert run.main([*nanochat_flags, f"--init_from={folder}"]) == 2
    err = capsys.readouterr().err
    assert "num_key_value_heads=2, this trainer's" in err and err.count("\n") == 1


KEYS = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(("name", "tensor", "message"), [
    (KEYS, None, f"{KEYS}' is missing"),
    (KEYS, torch.ones(16, 32), f"{KEYS} is (16, 32); (32, 32) is needed"),
    (KEYS, torch.full((32, 32), float("inf")), f"{KEYS} is not finite everywhere"),
    (KEYS, torch.ones(32, 32).int(), f"{KEYS} holds int32"),
    ("model.embed_tokens.weight", None, "model.embed_tokens.weight is missing"),
    ("model.embed_tokens.weight", torch.ones(61), "has 1 dimensions"),
    ("lm_head.weight", None, "'lm_head.weight' is missing"),
    ("lm_head.weight", torch.ones(60, 32), "lm_head.weight is (60, 32); (61, 32) is needed"),
    ("model.layers.1.mlp.fc1.weight", torch.ones(32, 128), "(32, 128); (128, 32) is needed"),
    ("model.norm.weight", torch.ones(32), "'model.norm.weight' is no parameter of such a model"),
    ("model.layers.7.mlp.fc1.weight", torch.ones(128, 32), "num_hidden_layers=2, its weights 3"),
])
def test_wrong_weights_are_one_line(name, tensor, message, folder, capsys):
    weights = load_file(folder / "model.safetensors")
    weights.pop(name, None)
    save_file(weights | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")
    assert sample.main([f"--init_from={folder}", "--device=cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder}: ") and message in err and err.count("\n") == 1


def test_the_gradient_of_relu_squared():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_squared, x)
