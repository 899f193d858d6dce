"""Others' models: Hugging Face's and nanoGPT's, read and written; scores and evaluation of them."""

import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import load_tokenizer
from gpt import GPT, GPTConfig, export, nanogpt, predict, sample
from gpt.run_folder import find_checkpoint
from gpt.scoring import token_losses
from train import build, evaluate, loop, run
from train.command_line import parse

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def hf_tiny(tmp_path_factory):
    """A random GPT2LMHeadModel with GPT-2's vocabulary, saved to a folder."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50257, n_positions=64, n_embd=32,
                                     n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # biases and norms, too
    folder = tmp_path_factory.mktemp("hf-tiny")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def gpt2_data(tmp_path_factory):
    """3,000 and 500 ids of GPT-2's vocabulary without a meta file, as in nanoGPT's openwebtext."""
    folder = tmp_path_factory.mktemp("gpt2-data")
    ids = (np.random.default_rng(0).zipf(1.3, 3500) % 50257).astype(np.uint16)
    ids[:3000].tofile(folder / "train.bin")
    ids[3000:].tofile(folder / "val.bin")
    return folder


SMALL_STEPS = ["--device=cpu", "--dtype=float32", "--compile=False", "--batch_size=2",
               "--gradient_accumulation_steps=2", "--max_iters=4",
               "--eval_interval=4", "--eval_iters=2", "--decay_lr=False", "--learning_rate=1e-3"]


def test_hugging_face_logits_are_the_same(hf_tiny):
    folder, theirs = hf_tiny
    ours, idx = GPT.from_pretrained(str(folder)), torch.randint(50257, (2, 64))
    assert ours.config.activation == "gelu_tanh" and ours.config.bias
    torch.testing.assert_close(ours.logits(idx), theirs(idx).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("change", "message"), [
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ({"activation_function": "relu"}, "activation 'relu'"),
    ({"n_inner": 100}, "inner width 100"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
])
def test_another_kind_of_gpt2_is_refused(hf_tiny, tmp_path, change, message):
    config = json.loads((hf_tiny[0] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(tmp_path))


def test_no_weights_and_no_network_is_one_line(monkeypatch, tmp_path, gpt2_data, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run.main([*SMALL_STEPS, "--init_from=gpt2", f"--data_dir={gpt2_data}",
                     f"--out_dir={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert "--init_from=gpt2: its weights cannot be loaded" in err and err.count("\n") == 1


def test_finetuning_starts_from_the_weights_and_learns(hf_tiny, gpt2_data, tmp_path):
    """nanoGPT's finetune_shakespeare in small: constant learning rate, cropped block size."""
    flags = [*SMALL_STEPS, f"--init_from={hf_tiny[0]}", f"--data_dir={gpt2_data}",
             f"--out_dir={tmp_path / 'out'}", "--block_size=32", "--max_iters=12",
             "--eval_interval=6", "--dropout=0.1"]
    built = build.build(parse(flags))
    assert built.model.config.block_size == 32 and built.model.config.dropout == 0.1
    idx = torch.randint(50257, (1, 32))
    torch.testing.assert_close(built.model.eval().logits(idx), hf_tiny[1](idx).logits,
                               rtol=0, atol=2e-5)
    assert run.main(flags) == 0
    log = [json.loads(line)
           for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [e["train/loss"] for e in log if "train/loss" in e]
    assert losses[-1] < losses[0] - 0.05
    assert {e["lr"] for e in log} == {1e-3}


def test_sampling_from_hugging_face_weights(hf_tiny, capsys):
    assert sample.main([f"--init_from={hf_tiny[0]}", "--start=Hello", "--num_samples=1",
                        "--max_new_tokens=5", "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("Hello")
    assert sample.main(["--init_from=nothing-of-the-kind"]) == 2
    assert "'nothing-of-the-kind' is no folder and no published size" in capsys.readouterr().err


def test_export_reloads_in_transformers_with_equal_logits(hf_tiny, gpt2_data, tmp_path, capsys):
    """Without biases and with GPT-2's padded vocabulary, whose padding goes."""
    out = tmp_path / "out"
    flags = [*SMALL_STEPS, f"--data_dir={gpt2_data}", f"--out_dir={out}", "--block_size=16",
             "--n_layer=1", "--n_head=2", "--n_embd=16"]
    assert run.main(flags) == 0
    assert export.main([f"--out_dir={out}", "--to=hf"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "hf").eval()
    idx = torch.randint(50257, (2, 16))
    ours = GPT.from_checkpoint(out).logits(idx)[..., :50257]
    torch.testing.assert_close(model(idx).logits, ours, rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "hf")
    assert tokenizer("Hello world, it's")["input_ids"] == [15496, 995, 11, 340, 338]
    assert export.main([f"--out_dir={out}", "--to=hf"]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    again = GPT.from_pretrained(str(out / "hf"))
    torch.testing.assert_close(again.logits(idx), model(idx).logits, rtol=1e-4, atol=1e-5)


def nanogpt_checkpoint(folder, tiny_flags, *, prefix=""):
    """A ckpt.pt with nanoGPT's keys, made without our writer: two steps of AdamW."""
    built = build.build(parse([*tiny_flags, "--dropout=0.0"]))
    model = built.model
    decay, rest = ([p for p in model.parameters() if (p.dim() >= 2) == wanted]
                   for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1},
                                   {"params": rest, "weight_decay": 0.0}],
                                  lr=1e-2, betas=(0.9, 0.95))
    for _ in range(2):
        model(*next(built.batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir()
    c = built.config.model
    torch.save({
        "model": {prefix + k: v for k, v in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
                       "block_size": c.block_size, "bias": c.bias,
                       "vocab_size": c.vocab_size, "dropout": 0.0},
        "iter_num": 2, "best_val_loss": torch.tensor(3.0), "config": {"batch_size": 4},
    }, folder / "ckpt.pt")
    return model, optimizer


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_checkpoint_goes_on_with_the_same_losses(tiny_flags, tmp_path, prefix):
    model, optimizer = nanogpt_checkpoint(tmp_path / "nano", tiny_flags, prefix=prefix)
    flags = [*tiny_flags, "--init_from=resume", f"--resume_dir={tmp_path / 'nano'}",
             "--dropout=0.0", "--gradient_accumulation_steps=1", "--grad_clip=0",
             "--decay_lr=False"]
    built = build.build(parse(flags))
    assert (built.step, built.best_val_loss) == (2, 3.0)
    batches = build.build(parse(flags)).batches
    for _ in range(3):
        theirs = model(*next(batches))
        theirs.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours = loop.train_step(built, lr=1e-2)[0]
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_nanogpt_checkpoint_is_written_with_its_keys(tiny_flags, tmp_path):
    """Trained here, exported, and resumed: the same moments, so the same next step."""
    assert run.main(tiny_flags) == 0
    assert export.main([f"--out_dir={tmp_path / 'out'}", "--to=nanogpt"]) == 0
    written = torch.load(tmp_path / "out" / "nanogpt" / "ckpt.pt", weights_only=True)
    assert written.keys() == {"model", "optimizer", "model_args", "iter_num",
                              "best_val_loss", "config"}
    assert {"transformer.wte.weight", "lm_head.weight",
            "transformer.h.1.mlp.c_proj.weight"} <= written["model"].keys()
    ours = build.build(parse([*tiny_flags, "--init_from=resume", "--max_iters=20",
                              "--dropout=0.0"]))
    theirs = build.build(parse([*tiny_flags, "--init_from=resume",
                                f"--resume_dir={tmp_path / 'out' / 'nanogpt'}", "--dropout=0.0"]))
    assert ours.step == theirs.step == 12
    losses = [loop.train_step(r, lr=1e-2)[0] for r in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/ridgegpt-was-here",)


def test_a_malicious_checkpoint_is_refused(tmp_path):
    torch.save({"model": Malicious()}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="not a nanoGPT checkpoint that can be read safely"):
        nanogpt.read(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="not a nanoGPT checkpoint that can be read safely"):
        nanogpt.read(tmp_path)
    assert not Path("/tmp/ridgegpt-was-here").exists()


def test_tanh_gelu_cannot_go_to_nanogpt(tmp_path):
    config = replace(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8),
                     activation="gelu_tanh")
    with pytest.raises(ValueError, match="nanoGPT knows only the exact GELU"):
        nanogpt.write(tmp_path / "ckpt.pt", config, {}, {}, 0, 0.0, {})


def test_token_losses_are_an_independent_computation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=29, n_layer=1, n_head=2, n_embd=16)).eval()
    ids = torch.randint(29, (21,))
    by_hand = []
    for t in range(1, 21):
        start_of_block = (t - 1) // 8 * 8
        p = model.logits(ids[None, start_of_block:t])[0, -1].double().softmax(-1)
        by_hand.append(-p[ids[t]].log().item())
    torch.testing.assert_close(token_losses(model, ids).double(),
                               torch.tensor(by_hand, dtype=torch.double), rtol=1e-5, atol=1e-6)


def test_predict_prints_perplexity_and_the_likeliest_tokens(tiny_flags, tmp_path, capsys):
    assert run.main(tiny_flags) == 0
    capsys.readouterr()
    flags = [f"--out_dir={tmp_path / 'out'}", "--device=cpu"]
    assert predict.main([*flags, "--text=abcdefgh", "--top=3"]) == 0
    out = capsys.readouterr().out.splitlines()
    model, ids = GPT.from_checkpoint(tmp_path / "out"), torch.arange(8)
    mean = F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:]).item()
    assert out[0] == f"8 tokens, mean loss {mean:.4f}, perplexity {math.exp(mean):.4f}"
    best = model.logits(ids[None], last_only=True)[0, 0].softmax(-1).topk(3)
    assert [int(line.split()[2]) for line in out[2:]] == best.indices.tolist()
    for bad in ([], ["--text=a", "--file=b"], ["--text=A"], ["--file=/nowhere"],
                ["--text=a", "--top=0"]):
        assert predict.main([*flags, *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_is_transformers_loss_over_the_whole_split(hf_tiny, gpt2_data, capsys):
    folder, theirs = hf_tiny
    asked = evaluate.Evaluate(init_from=str(folder), data_dir=str(gpt2_data), batch_size=3,
                              device="cpu", dtype="float32")
    figures = evaluate.evaluate(asked)
    ids = torch.from_numpy(np.fromfile(gpt2_data / "val.bin", dtype=np.uint16).astype(np.int64))
    losses = []
    for s in range(0, 499, 64):
        window = ids[s : s + 65]
        losses.append(F.cross_entropy(theirs(window[None, :-1]).logits[0].double(), window[1:],
                                      reduction="sum").item())
    assert figures["tokens"] == 499
    assert figures["loss"] == pytest.approx(sum(losses) / 499, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    n_bytes = len(load_tokenizer(None).decode_bytes(ids[1:].tolist()))
    assert figures["bits per byte"] == pytest.approx(sum(losses) / math.log(2) / n_bytes, rel=1e-4)
    assert "bits per byte: " in capsys.readouterr().out


def test_hellaswag_and_lambada_by_brute_force(hf_tiny, tmp_path):
    folder, theirs = hf_tiny
    encode = load_tokenizer(None).encode
    examples = [{"ctx": "A man walks", "endings": ["home", "into a large red house", "off",
                                                   "and sings"], "label": i % 4} for i in range(8)]
    texts = ["the cat sat on the mat", "she looked at him and smiled", "one two three"]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

    def losses(context, ending):
        ids = torch.tensor(encode(context) + encode(ending))
        n = len(encode(ending))
        return F.cross_entropy(theirs(ids[None, :-1]).logits[0, -n:], ids[-n:], reduction="none")

    figures = evaluate.evaluate(evaluate.Evaluate(
        init_from=str(folder), hellaswag=str(tmp_path / "h.jsonl"),
        lambada=str(tmp_path / "l.jsonl"), device="cpu", dtype="float32"))
    scores = [losses("A man walks", " " + e) for e in examples[0]["endings"]]
    for name, score in (("acc", torch.Tensor.sum), ("acc_norm", torch.Tensor.mean)):
        best = min(range(4), key=lambda i: score(scores[i]).item())
        right = sum(e["label"] == best for e in examples)
        assert figures[f"hellaswag {name}"] == right / 8
    total = sum(losses(t.rpartition(" ")[0], " " + t.rpartition(" ")[2]).sum().item()
                for t in texts)
    assert figures["lambada ppl"] == pytest.approx(math.exp(total / 3), rel=1e-4)


@pytest.mark.parametrize(("flags", "message"), [
    ([], "nothing to evaluate on"), (["--data_dir=/nowhere"], "/nowhere/val.bin"),
    (["--hellaswag=BAD"], "line 1: not JSON"),
    (["--lambada=GOOD"], "line 1: no 'text'"), (["--data_dir=DATA", "--split=test"], "test.bin"),
    (["--batch_size=0"], "batch_size=0"),
])
def test_bad_evaluation_input_is_one_line(flags, message, hf_tiny, gpt2_data, tmp_path, capsys):
    (tmp_path / "bad").write_text("nonsense\n")
    (tmp_path / "good").write_text("{}\n")
    named = {"BAD": tmp_path / "bad", "GOOD": tmp_path / "good", "DATA": gpt2_data}
    split = (f.partition("=") for f in flags)
    flags = [f"{key}={named.get(value, value)}" for key, _, value in split]
    assert evaluate.main([f"--init_from={hf_tiny[0]}", "--device=cpu", "--dtype=float32",
                          *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_our_checkpoint_is_a_beginning_too(tiny_flags, tmp_path):
    """--init_from=DIR takes the weights and nothing else: step 0, fresh optimizer."""
    assert run.main(tiny_flags) == 0
    built = build.build(parse([*tiny_flags, f"--init_from={tmp_path / 'out'}",
                               f"--out_dir={tmp_path / 'other'}"]))
    assert built.step == 0 and not built.optimizer.state
    trained = GPT.from_checkpoint(find_checkpoint(tmp_path / "out"))
    assert all(torch.equal(a, b)
               for a, b in zip(built.model.parameters(), trained.parameters(), strict=True))
