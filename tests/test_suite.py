"""One command for all measurements (bench/suite.py), and two of its parts: parity and memory."""

import importlib
import json
import math
import os
import time

import pytest
import torch

from bench import suite
from bench.curves import parity
from bench.steps import memory
from bench.suite import Part
from train.command_line import parse

WRITES = ("-c", "import json, sys; json.dump({'cases': {'a': 1}}, open(sys.argv[1], 'w')); "
                "print('done')", "{out}")


def outcome(part, tmp_path, seconds=20.0):
    return suite.run(part, seconds, tmp_path, "cpu")


def test_a_part_that_ends_well_has_its_result(tmp_path):
    found = outcome(Part("x", WRITES, 1, 0), tmp_path)
    assert (found.status, found.result) == ("passed", {"cases": {"a": 1}})
    assert (tmp_path / "x-cpu.json").exists() and (tmp_path / "x.log").read_text() == "done\n"


def test_a_part_finds_the_checkout_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    shows = Part("x", ("-c", "import os; print(os.environ['PYTHONPATH'])"), 1, 0)
    assert outcome(shows, tmp_path).log == [f"{suite.ROOT}{os.pathsep}/wheels"]
    monkeypatch.delenv("PYTHONPATH")
    assert outcome(shows, tmp_path).log == [str(suite.ROOT)]


def test_a_part_that_fails_is_told_with_its_last_line(tmp_path):
    found = outcome(Part("x", ("-c", "print('one'); raise SystemExit('no memory')"), 1, 0),
                    tmp_path)
    assert found.status == "failed" and found.why == "exit code 1: no memory"


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_wrote(tmp_path):
    child = tmp_path / "alive"
    hangs = ("import json, subprocess, sys, time; json.dump({'half': 1}, open(sys.argv[1], 'w'));"
             f"subprocess.Popen(['sh', '-c', 'sleep 2; touch {child}']); time.sleep(60)")
    began = time.monotonic()
    found = outcome(Part("x", ("-c", hangs, "{out}"), 1, 0), tmp_path, seconds=1.2)
    assert time.monotonic() - began < 10
    assert found.status == "timed out" and found.result == {"half": 1}
    time.sleep(2.2)
    assert not child.exists(), "a child outlived its part"


def test_an_old_result_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "x-cpu.json").write_text('{"old": 1}')
    assert outcome(Part("x", ("-c", "raise SystemExit(1)"), 1, 0), tmp_path).result is None


def test_what_does_not_fit_is_skipped_and_named(tmp_path):
    found = outcome(Part("x", WRITES, 1, least_s=30), tmp_path, seconds=12)
    assert found.status == "skipped" and "12 s left" in found.why and "30" in found.why
    assert outcome(Part("x", WRITES, 1, 0, skip="needs a GPU"), tmp_path).why == "needs a GPU"


def test_one_failure_does_not_stop_the_next_part(tmp_path, monkeypatch, capsys):
    bad = Part("bad", ("-c", "raise SystemExit(3)"), 1, 0)
    good, big = Part("good", WRITES, 1, 0), Part("big", WRITES, 1, 1e9)
    monkeypatch.setattr(suite, "parts", lambda _: [bad, good, big])
    assert suite.main(suite.Options(device="cpu", minutes=1, out=str(tmp_path))) == 1
    result = json.loads((tmp_path / "suite-cpu.json").read_text())
    assert [(name, p["status"]) for name, p in result["parts"].items()] == [
        ("bad", "failed"), ("good", "passed"), ("big", "skipped")]
    assert result["parts"]["good"]["result"] == {"cases": {"a": 1}}
    assert result["environment"]["torch"]
    assert "not passed: bad" in capsys.readouterr().out


def test_time_that_a_part_leaves_goes_to_those_after_it(tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(suite, "run", lambda part, seconds, *_: shares.append(seconds)
                        or suite.Outcome("passed"))
    monkeypatch.setattr(suite, "parts", lambda _: [
        Part(name, (), weight, 0) for name, weight in (("a", 2), ("b", 1), ("c", 1))])
    assert suite.main(suite.Options(device="cpu", minutes=1, out=str(tmp_path))) == 0
    assert shares == pytest.approx([30, 30, 60], abs=0.5)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_part_is_a_file_of_this_checkout_with_flags_it_knows(device):
    for part in suite.parts(device):
        if part.command and part.command[0] != "-m":
            module = part.command[0].removesuffix(".py").replace("/", ".")
            options = importlib.import_module(module).Options
            flags = {word[2:].partition("=")[0] for word in part.command[1:]}
            assert flags <= set(options.__dataclass_fields__), part.name


def test_a_gpus_parts_begin_with_what_costs_least_and_tells_most():
    names = [part.name for part in suite.parts("cuda")]
    assert names[:6] == ["ring3", "operators-attention", "operators-layernorm",
                         "operators-cross_entropy", "flush", "step-124M"]
    eager, compiled = (next(p for p in suite.parts("cuda") if p.name == name)
                       for name in ("step-124M", "mfu-124M"))
    assert "--compile=False" in eager.command and "--compile=False" not in compiled.command
    assert all("--profile=True" in part.command for part in (eager, compiled))
    merged = {part.merge_into for part in suite.parts("cuda") if part.name.startswith("operators")}
    assert merged == {"operators"}


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="'mfu-2B'"):
        suite.choose(suite.parts("cuda"), "ring3,mfu-2B")
    found = suite.choose(suite.parts("cuda"), "memory,ring3")
    assert [part.name for part in found] == ["ring3", "memory"]


def test_sizes_are_gathered_in_one_file_unless_from_another_commit(tmp_path):
    def measured(commit, case):
        environment = {"commit": commit, "dirty": False, "gpu": {"name": "G"}, "cpu": "C",
                       "torch": "2", "triton": "3"}
        return {"environment": environment, "cases": {case: {}}}
    part, into = tmp_path / "mfu-124M.json", tmp_path / "mfu-cuda.json"
    for commit, case, expected in (("a", "124M", ["124M"]), ("a", "350M", ["124M", "350M"]),
                                   ("b", "774M", ["774M"])):
        part.write_text("{}")
        suite.merge(part, into, measured(commit, case))
        assert list(json.loads(into.read_text())["cases"]) == expected and not part.exists()


# -- parity ----------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [True, False])
def test_the_runs_of_parity_have_flags_that_the_trainer_takes(cuda):
    config = parse([*parity.settings(20, 4, cuda), "--data_dir=x", "--kernels=torch"])
    assert config.optim.max_iters == config.run.eval_interval == 20 and config.data.batch_size == 4
    assert (config.model.n_layer, config.model.n_embd) == ((12, 768) if cuda else (2, 32))


@pytest.mark.parametrize("off, code", [(0.0, 0), (0.5, 1), (math.nan, 1)])
def test_parity_is_the_validation_losses_being_close(tmp_path, monkeypatch, off, code):
    monkeypatch.setattr(parity, "write_corpus", lambda *_: "text")
    monkeypatch.setattr(parity, "train", lambda path, flags: {
        "loss": [3.0, 2.0 + 0.1 * (path.name == "torch")],
        "val_loss": 2.0 + off * (path.name == "torch"), "tokens_per_s": 1.0})
    monkeypatch.setattr(parity, "write_result", lambda path, result: saved.update(result))
    saved = {}
    assert parity.main(parity.Options(device="cpu", out=str(tmp_path / "p.json"))) == code
    apart = saved["against"]["torch"]
    assert (apart["mean"], apart["most"]) == (pytest.approx(0.05), pytest.approx(0.1))


def test_parity_needs_two_backends():
    with pytest.raises(ValueError, match="at least two"):
        parity.main(parity.Options(device="cpu", backends="torch"))


def test_the_corpus_of_parity_is_gpt2s_tokens_where_its_vocabulary_is(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    files = ["abc.py", "this.py", "contextlib.py", "string.py"]
    monkeypatch.setattr(parity.prepare, "source_files", lambda root: files)
    monkeypatch.setattr(parity.prepare, "is_validation", lambda path: path == "this.py")
    assert "GPT-2" in parity.write_corpus(tmp_path / "data", True)
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["vocab_size"] == 50257


# -- memory ----------------------------------------------------------------------


def test_memory_doubles_the_batch_until_it_does_not_fit():
    assert memory.sweep(lambda batch: 10 * batch if batch < 6 else None) == {1: 10, 2: 20, 4: 40}
    assert memory.sweep(lambda batch: None) == {}
    assert max(memory.sweep(lambda batch: 1)) == memory.MOST


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_memory_without_a_gpu_is_one_clear_line():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        memory.main(memory.Options())


