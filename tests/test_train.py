"""The loop: what one run must equal, and what may not disturb it."""

import json
import math
import re
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import hardware
from data.loader import eval_batches, windows_per_epoch
from data.manifest import shard_entry, write_manifest
from gpt.config import ARCHITECTURES
from gpt.flops import flops_per_token
from gpt.run_folder import complete_checkpoints
from tests import ranks
from tests.conftest import every_architecture
from train import build, loop, run
from train.command_line import parse
from train.parallel import World
from train.report import Report
from train.signals import StopRequest

ROOT = Path(__file__).parents[1]


def out(flags):
    return Path(next(f for f in flags if f.startswith("--out_dir=")).partition("=")[2])


def final(folder):
    """Everything a finished run left that the next step would depend on."""
    newest = complete_checkpoints(folder)[-1]
    tensors = {}
    for name in ("model", "optimizer", "rng"):
        tensors |= {f"{name}:{k}": v for k, v in load_file(newest / f"{name}.safetensors").items()}
    return newest.name, tensors, json.loads((newest / "state.json").read_text())["position"]


def assert_same_run(a, b):
    (name_a, tensors_a, position_a), (name_b, tensors_b, position_b) = final(a), final(b)
    assert (name_a, position_a) == (name_b, position_b)
    assert tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[k], tensors_b[k]) for k in tensors_a)


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@every_architecture
def test_a_run_leaves_what_scripts_rely_on(tiny_flags, capsys):
    assert run.main(tiny_flags) == 0
    lines, folder = capsys.readouterr().out.splitlines(), out(tiny_flags)
    assert any(line.startswith("step 0: train loss ") and ", val loss " in line for line in lines)
    step = re.compile(r"iter 0: loss \d\.\d{4}, time \d+\.\d\dms, [\d,]+ tok/s")
    assert any(map(step.fullmatch, lines)), "nanoGPT's line, and no MFU of a CPU"
    assert "tokens per iteration will be: 128" in lines
    evaluations = [e for e in entries(folder) if "val/loss" in e]
    assert [e["iter"] for e in evaluations] == [0, 4, 8, 12]
    assert {"iter", "train/loss", "val/loss", "lr", "mfu"} <= evaluations[0].keys()
    assert [e["iter"] for e in entries(folder) if "loss" in e] == list(range(12))
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "tokens"} <= entries(folder)[1].keys()
    assert evaluations[-1]["val/loss"] < evaluations[0]["val/loss"] - 0.2
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 29
    # should one be damaged
    assert [c.name for c in complete_checkpoints(folder)] == ["step-00000008", "step-00000012"]
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pt")]


def test_a_steps_time_on_a_cpu_is_its_own(tiny_flags, monkeypatch):
    """Each step once had the next one's time, and the last before an evaluation had nearly none."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    report = Report(parse(tiny_flags), World(), torch.device("cpu"), StopRequest())
    report.begin(0, False)
    for step, ms in enumerate((10, 20, 30)):
        now[0] += ms / 1000
        report.step(step, 1e-3, torch.tensor([2.0, 1.0, 0.0, 0.0]),
                    types.SimpleNamespace(position=0, epoch=0.0))
    report.write_pending()
    assert [e["time_ms"] for e in entries(out(tiny_flags))] == pytest.approx([10, 20, 30])


def test_a_steps_time_on_a_gpu_is_the_devices(tiny_flags, monkeypatch, capsys):
    """The host runs ahead of the device, which ends a step every 40 ms.

    By the host's clock the last step before an evaluation took what was left of it, and its MFU
    exceeded 100 %, which ended the run.
    """
    monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(hardware, "peak_memory_bytes", lambda device: 0)
    monkeypatch.setattr(hardware, "now", lambda device: 0.0)
    monkeypatch.setattr(hardware, "read_later", lambda end: lambda: ([2.0, 1.0, 0.0, 0.0], end))
    flags = [*tiny_flags, "--peak_tflops=1e-3"]
    report = Report(parse(flags), World(), torch.device("cuda"), StopRequest())
    report.begin(0, False)
    for step, end in enumerate((0.04, 0.08, 0.12)):
        report.step(step, 1e-3, end, types.SimpleNamespace(position=0, epoch=0.0))
    report.write_pending()
    written = entries(out(tiny_flags))
    assert [e["time_ms"] for e in written] == pytest.approx([40, 40, 40])
    used = flops_per_token(report.config.model)["palm"] * written[2]["tokens_per_s"] / 1e9
    assert written[2]["mfu"] == pytest.approx(100 * used)
    assert f"time 40.00ms, 3,200 tok/s, mfu {100 * used:.2f}%" in capsys.readouterr().out


@every_architecture
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bit_equal_with_dropout_accumulation_and_in_the_middle_of_an_epoch(
        dtype, tiny_flags, tmp_path):
    """12 steps, and 4 + 4 + 4: weights, moments, generators and data position are bit-equal."""
    tiny_flags = [*tiny_flags, f"--dtype={dtype}"]
    assert run.main(tiny_flags) == 0
    parts = [f for f in tiny_flags
             if not f.startswith("--out_dir")] + [f"--out_dir={tmp_path / 'parts'}"]
    for limit in (4, 8, 12):
        assert run.main([*parts, f"--max_iters={limit}", "--init_from=auto"]) == 0
    assert_same_run(out(tiny_flags), tmp_path / "parts")
    once, pieces = entries(out(tiny_flags)), entries(tmp_path / "parts")
    assert [(e["iter"], e.get("loss"), e.get("val/loss")) for e in once] == \
           [(e["iter"], e.get("loss"), e.get("val/loss")) for e in pieces]


@pytest.mark.parametrize(("delay", "architecture"), list(zip((0.0, 0.15), ARCHITECTURES)))
def test_a_killed_run_resumes_bit_equal(delay, tiny_flags, tmp_path):
    """kill -9 after the first checkpoint, perhaps inside the next save; then the same command.

    All processes have one thread: with another number sums are taken in another order.
    """
    flags = [*tiny_flags, "--max_iters=60", "--lr_decay_iters=60", "--log_interval=1"]
    assert ranks.run(ranks.train, (flags,), 1, tmp_path / "logs") == [0]
    killed = [f for f in flags if not f.startswith("--out_dir")]
    killed += [f"--out_dir={tmp_path / 'killed'}", "--init_from=auto"]
    (process,) = ranks.start(ranks.train, (killed,), 1, tmp_path / "logs")
    while not complete_checkpoints(tmp_path / "killed") and process.is_alive():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    survived = complete_checkpoints(tmp_path / "killed")
    assert survived
    assert ranks.run(ranks.train, (killed,), 1, tmp_path / "logs") == [0]
    assert_same_run(out(flags), tmp_path / "killed")
    assert [e["iter"] for e in entries(tmp_path / "killed") if "loss" in e] == list(range(60))


@every_architecture
def test_accumulation_is_a_larger_batch(tiny_flags):
    """4 micro-batches of 2 give the gradient of 1 of 8: same windows, same weight of each token."""
    gradients = []
    for batch, steps in ((2, 4), (8, 1)):
        config = parse([*tiny_flags, f"--batch_size={batch}",
                        f"--gradient_accumulation_steps={steps}", "--dropout=0.0"])
        built = build.build(config)
        gradients.append((loop.accumulate(built), [p.grad for p in built.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@every_architecture
def test_the_gradient_is_clipped(tiny_flags):
    norms = []
    for limit in (0.0, 0.01):
        built = build.build(parse([*tiny_flags, f"--grad_clip={limit}", "--optimizer=sgd",
                                   "--momentum=0", "--weight_decay=0"]))
        before = [p.detach().clone() for p in built.model.parameters()]
        loop.train_step(built, lr=1.0)
        moved = [(p - b).detach().flatten()
                 for p, b in zip(built.model.parameters(), before, strict=True)]
        norms.append(torch.cat(moved).norm().item())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


@every_architecture
def test_evaluation_is_repeatable_and_disturbs_nothing(tiny_flags):
    built = build.build(parse(tiny_flags))
    state, position = torch.get_rng_state(), built.batches.position
    first = loop.evaluate(built)
    assert first == loop.evaluate(built)
    assert torch.equal(state, torch.get_rng_state())
    assert built.batches.position == position and built.model.training
    assert abs(first["val"] - math.log(29)) < 0.2


@every_architecture
def test_evaluation_is_brute_force_over_all_windows(tiny_flags):
    """With enough batches every window counts once: sum of losses over sum of tokens."""
    config = parse([*tiny_flags, "--eval_iters=1000", "--batch_size=1"])
    built = build.build(config)
    tokens = built.tokens["val"]
    n = windows_per_epoch(len(tokens), 16)
    losses = [built.model.eval()(x, y).item() for x, y in
              eval_batches(tokens, block_size=16, batch_size=1, count=1000, seed=config.run.seed)]
    assert len(losses) == n
    assert loop.evaluate(built)["val"] == pytest.approx(sum(losses) / n, rel=1e-6)


def test_a_changed_shard_is_named_at_start(tiny_flags, tiny_data, capsys):
    """The manifest beside the tokens has each file's checksum (data/manifest.py)."""
    splits = {}
    for split, n in (("train", 4000), ("val", 800)):
        shards = [shard_entry(tiny_data / f"{split}.bin", n)]
        splits[split] = {"tokens": n, "max_id": 28, "shards": shards}
    write_manifest(tiny_data, {}, "char", 29, splits)
    content = bytearray((tiny_data / "val.bin").read_bytes())
    content[100] ^= 1
    (tiny_data / "val.bin").write_bytes(content)
    assert run.main(tiny_flags) == 2
    assert "val.bin" in capsys.readouterr().err


def test_eval_only_writes_nothing(tiny_flags, capsys):
    assert run.main([*tiny_flags, "--eval_only=True"]) == 0
    assert "step 0: train loss " in capsys.readouterr().out
    assert not out(tiny_flags).exists()
    assert run.main(tiny_flags) == 0
    before = {p: p.stat().st_mtime_ns for p in out(tiny_flags).rglob("*")}
    assert run.main([*tiny_flags, "--eval_only=True", "--init_from=resume"]) == 0
    assert "step 12: train loss " in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out(tiny_flags).rglob("*")} == before


@every_architecture
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_tracks_fp32(dtype, tiny_flags, tmp_path):
    """And resumes bit-equal, the loss scale of fp16 included."""
    flags = [f for f in tiny_flags if "out_dir" not in f] + ["--dropout=0.0"]
    losses = {}
    for name, extra in {"float32": [], dtype: [f"--dtype={dtype}"]}.items():
        assert run.main([*flags, f"--out_dir={tmp_path / name}", *extra]) == 0
        losses[name] = [e["val/loss"] for e in entries(tmp_path / name) if "val/loss" in e]
    assert losses[dtype] == pytest.approx(losses["float32"], rel=0.02)
    assert losses[dtype] != losses["float32"]
    for limit in (4, 12):
        assert run.main([*flags, f"--dtype={dtype}", f"--out_dir={tmp_path / 'parts'}",
                         f"--max_iters={limit}", "--init_from=auto"]) == 0
    assert_same_run(tmp_path / dtype, tmp_path / "parts")


def test_the_same_seed_gives_the_same_run_and_another_does_not(tiny_flags, tmp_path):
    base = [f for f in tiny_flags if "out_dir" not in f]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run.main([*base, f"--out_dir={tmp_path / name}", f"--seed={seed}",
                         "--max_iters=4"]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "c")


def test_compiled_training_is_the_same_training(tiny_flags, tmp_path):
    flags = [f for f in tiny_flags if "out_dir" not in f
             and "--compile" not in f] + ["--dropout=0.0", "--max_iters=4", "--n_layer=1"]
    for value in (True, False):
        assert run.main([*flags, f"--out_dir={tmp_path / str(value)}", f"--compile={value}"]) == 0
    (_, compiled, _), (_, eager, _) = final(tmp_path / "True"), final(tmp_path / "False")
    assert compiled.keys() == eager.keys()
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-5)


@every_architecture
def test_every_optimizer_trains_and_resumes(tiny_flags, tmp_path):
    base = [f for f in tiny_flags if "out_dir" not in f]
    for name in ("adam", "sgd", "muon"):
        flags = [*base, f"--optimizer={name}", "--learning_rate=0.02", "--schedule=trapezoid"]
        assert run.main([*flags, f"--out_dir={tmp_path / name}"]) == 0
        for limit in (4, 12):
            assert run.main([*flags, f"--out_dir={tmp_path / name}-parts", f"--max_iters={limit}",
                             "--init_from=auto"]) == 0
        assert_same_run(tmp_path / name, tmp_path / f"{name}-parts")
    assert run.main([*base, f"--out_dir={tmp_path / 'sgd'}", "--init_from=resume",
                     "--max_iters=20"]) == 2


def test_loggers_get_nanogpts_keys_and_a_missing_one_is_a_warning(
        tiny_flags, tmp_path, monkeypatch, capsys):
    logged = []
    fake = types.SimpleNamespace(init=lambda **how: logged.append(how), log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run.main([*tiny_flags, "--wandb_log=True", "--wandb_run_name=me",
                     "--tensorboard=True"]) == 0
    assert (logged[0]["project"], logged[0]["name"]) == ("owt", "me")
    assert logged[0]["config"]["n_layer"] == 2
    assert {"iter", "train/loss", "val/loss", "lr", "mfu"} <= logged[1].keys()
    warning = "warning: --tensorboard=True, but tensorboard is not installed"
    assert capsys.readouterr().out.count(warning) == 1
