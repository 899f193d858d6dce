"""What --architecture chooses: its fields, files and messages. On a CPU, float32 unless it says."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gpt import GPT, GPTConfig, export, huggingface, nanochat, sample
from gpt.checkpoint_files import config_json, entry, read_config
from gpt.config import make_config
from gpt.generate import generate
from gpt.layers import Context
from gpt.run_folder import complete_checkpoints, find_checkpoint
from tests.conftest import every_architecture
from tests.numerics import stirred
from train import build, run
from train.command_line import parse

ROOT = Path(__file__).parents[1]
TINY = GPTConfig("nanochat", block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
NEW = ("architecture", "rope_theta", "logit_cap")  # fields that old files do not have


def edit(file, change):
    """Apply `change` to the value in a checkpoint's JSON file, and tell DONE."""
    value, done = json.loads(file.read_text()), file.parent / "DONE"
    change(value)
    file.write_text(json.dumps(value))
    done.write_text(json.dumps(json.loads(done.read_text()) | {file.name: entry(file)}))


# -- the command line and configs ----------------------------------------------------------


@pytest.mark.parametrize(("flags", "says"), [
    (["--bias=True"], "bias=True: nanochat has no such thing; leave it at False, or take "
                      "--architecture=gpt2"),
    (["--activation=gelu_tanh"], "activation=gelu_tanh: nanochat has no such thing"),
    (["--architecture=gpt2", "--rope_theta=500"], "rope_theta=500.0: gpt2 has no such thing; leave "
     "it at 10000.0, or take --architecture=nanochat"),
    (["--architecture=nanochatt"], "'nanochatt' for argument '--architecture'. Expected one of "
                                   "('gpt2', 'nanochat'"),
    (["--n_head=16"], "n_embd / n_head is 1; rotary positions take pairs"),
    (["--rope_theta=0.5"], "rope_theta=0.5: must be from 1 to 1e12"),
    (["--rope_theta=nan"], "rope_theta=nan: must be finite"),
    (["--logit_cap=1e39"], "logit_cap=1e+39: must be from 0 to 1e6"),
    (["--logit_cap=-1"], "logit_cap=-1.0: must be from 0"),
])
def test_what_cannot_be_is_refused_in_one_line(flags, says, tiny_flags, tmp_path, capsys):
    """--logit_cap=1e39 and --rope_theta=1e-300 trained on NaN."""
    assert run.main([*tiny_flags, "--architecture=nanochat", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_config_file_with_an_unknown_one_is_one_line(tiny_flags, tmp_path, capsys):
    """It was a KeyError."""
    config = tmp_path / "mine.py"
    for source, says in (
        ("from train.config import *\nconfig = Config(model=GPTConfig('nanochatt'))",
         "line 2: architecture='nanochatt': choose gpt2 or nanochat"),
        ("architecture = 'nanochatt'", "architecture='nanochatt' is a str"),
    ):
        config.write_text(source)
        assert run.main([str(config), *tiny_flags]) == 2
        err = capsys.readouterr().err
        assert says in err and str(config) in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", ["nanogpt", "yaml"])
def test_other_configs_may_name_it(kind, tmp_path):
    if kind == "yaml":
        pytest.importorskip("hydra", reason="hydra-core is not installed")
        text = "model:\n  architecture: gpt2\n  rope_theta: 5e2\n"
        (tmp_path / "mine.yaml").write_text(text)
        argv = [f"--config-path={tmp_path}", "--config-name=mine", "model.architecture=nanochat"]
    else:
        (tmp_path / "mine.py").write_text("architecture = 'nanochat'\nrope_theta = 5e2\n")
        argv = [str(tmp_path / "mine.py")]
    config = parse(argv).model
    assert (config.architecture, config.rope_theta, config.tied) == ("nanochat", 500.0, False)


@every_architecture
def test_a_published_head_is_no_setting_to_tell(architecture, tiny_flags):
    """A run's config says whether the head is tied; that was told as a change, in every run."""
    built = build.build(parse(tiny_flags))
    assert built.config.model.tie_weights == built.config.model.tied
    assert "tie_weights" not in build.describe(built)
    other = [*tiny_flags, f"--tie_weights={not built.config.model.tied}"]
    assert f"tie_weights={not built.config.model.tied}" in build.describe(build.build(parse(other)))


# -- checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_flags):
    """The flags, without an architecture, of a finished run of nanochat's with settings of its own.

    It has 4 steps.
    """
    flags = [f for f in tiny_flags if "--architecture" not in f] + ["--max_iters=4"]
    assert run.main([*flags, "--architecture=nanochat", "--rope_theta=500", "--logit_cap=3"]) == 0
    return flags


def test_a_resumed_run_is_of_its_checkpoints_architecture(trained, tmp_path, capsys):
    """Without a flag; a flag with another value is refused, and both values are named."""
    for flags, says in (
        (["--architecture=nanochat", "--rope_theta=700"],
         "rope_theta is 500.0 there and 700.0 here"),
        (["--architecture=nanochat", "--logit_cap=30"], "logit_cap is 3.0 there and 30.0 here"),
        (["--tie_weights=True"], "tie_weights is False there and True here"),
        (["--rope_theta=500"], "gpt2 has no such thing; leave it at 10000.0, or take "
                               "--architecture=nanochat"),
        (["--bias=True"], "bias is False there and True here"),
    ):
        capsys.readouterr()
        assert run.main([*trained, "--init_from=resume", "--max_iters=8", *flags]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert run.main([*trained, "--init_from=resume", "--max_iters=8"]) == 0
    config = read_config(find_checkpoint(tmp_path / "out"))
    assert (config.architecture, config.rope_theta, config.logit_cap) == ("nanochat", 500.0, 3.0)
    again = ["--init_from=resume", "--architecture=nanochat", "--rope_theta=500"]
    assert run.main([*trained, *again, "--max_iters=8"]) == 0


def test_a_run_of_another_architecture_is_refused(trained, tmp_path, capsys):
    plain = [*trained, f"--out_dir={tmp_path / 'plain'}"]
    assert run.main(plain) == 0
    assert run.main([*plain, "--init_from=resume", "--architecture=nanochat"]) == 2
    err = capsys.readouterr().err
    assert "architecture is gpt2 there and nanochat here" in err and err.count("\n") == 1


def test_a_tied_head_trains_and_resumes(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--tie_weights=True"]
    for limit in (4, 8):
        assert run.main([*flags, "--architecture=nanochat", f"--max_iters={limit}",
                         "--init_from=auto"]) == 0
    model = GPT.from_checkpoint(tmp_path / "out")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.architecture == "nanochat" and model.config.tie_weights is True


def test_a_checkpoint_from_before_there_were_architectures_is_gpt2s(tiny_flags, tmp_path, capsys):
    """It resumes as one that has the fields, and its text is the same."""
    assert run.main([*tiny_flags, "--max_iters=4"]) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    for folder in complete_checkpoints(tmp_path / "old"):
        edit(folder / "model.json", lambda model: [model.pop(key) for key in NEW])
        edit(folder / "state.json", lambda state: [state["config"].pop(key) for key in NEW])
    said = []
    for name in ("out", "old"):
        flags = [*tiny_flags, f"--out_dir={tmp_path / name}", "--init_from=resume"]
        assert run.main([*flags, "--max_iters=8"]) == 0
        capsys.readouterr()
        assert sample.main([f"--out_dir={tmp_path / name}", "--device=cpu", "--num_samples=1",
                            "--max_new_tokens=40"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize(("values", "says"), [
    ({"architecture": "nonsense"}, "not any of ('gpt2', 'nanochat'"),
    ({"architecture": ["nanochat"]}, "architecture"),
    ({"bias": True}, "bias=True: nanochat has no such thing"),
    ({"rope_theta": 0.0}, "rope_theta=0.0: must be from 1"),
    ({"logit_cap": "x"}, "logit_cap"),
])
def test_a_wrong_model_json_is_named_in_one_line(values, says, trained, tmp_path, capsys):
    for folder in complete_checkpoints(tmp_path / "out"):
        edit(folder / "model.json", lambda model: model.update(values))
    for main, flags in ((run.main, [*trained, "--init_from=resume", "--max_iters=8"]),
                        (sample.main, [f"--out_dir={tmp_path / 'out'}", "--device=cpu"])):
        capsys.readouterr()
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert "model.json: " in err and says in err and err.count("\n") == 1


@every_architecture
@pytest.mark.parametrize("seam", [-1, 1])
def test_a_config_is_read_as_it_was_written(seam, architecture, tmp_path):
    config = make_config(seam, **asdict(TINY) | {"architecture": architecture, "window": 7,
                                                 "tie_weights": architecture != "gpt2"})
    (tmp_path / "model.json").write_text(config_json(config))
    assert read_config(tmp_path) == config and type(read_config(tmp_path)) is type(config)


# -- nanochat's ------------------------------------------------------------------------------


def test_one_that_transformers_does_not_have_is_not_exported(tiny_flags, tmp_path, monkeypatch,
                                                             capsys):
    monkeypatch.delitem(huggingface.TRANSLATIONS, "nanochat")
    assert run.main([*tiny_flags, "--architecture=nanochat", "--max_iters=1"]) == 0
    for to in ("hf", "nanogpt"):
        capsys.readouterr()
        assert export.main([f"--out_dir={tmp_path / 'out'}", f"--to={to}"]) == 2
        err = capsys.readouterr().err
        assert f"architecture=nanochat, which --to={to} cannot express; only a model" in err
        assert err.count("\n") == 1


def test_branches_start_at_0_and_the_head_nearly():
    model = GPT(GPTConfig("nanochat", block_size=8, vocab_size=512, n_layer=2, n_head=2,
                          n_embd=256))
    for name, p in model.named_parameters():
        wanted = {"transformer.wte.weight": 0.8, "lm_head.weight": 0.001}.get(name, 1 / 16)
        wanted = 0.0 if name.endswith("c_proj.weight") else wanted
        assert p.std().item() == pytest.approx(wanted, rel=0.02), name


def test_only_the_distance_of_positions_counts():
    """The same tokens at positions 0 and at 1000 give the same features, at 2000 too."""
    model = stirred(GPT(TINY)).double()
    idx, found = torch.randint(65, (2, 16)), []
    for start in (0, 1000, 2000):
        x, rotation = model.transformer.embed(idx, start)
        residual = None
        for block in model.transformer.h:
            x, residual = block(x, residual, Context(rotation))
        found.append(x + residual)
    for later in found[1:]:  # the angles are fp32, and have an error of 2000 * 2^-24
        torch.testing.assert_close(later, found[0], rtol=1e-3, atol=1e-3)
    swapped = model.features(idx.flip(1)).flip(1)
    assert (swapped - model.features(idx)).abs().max() > 0.1, "the order counts"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_angles_are_fp32_whatever_the_weights_are(dtype):
    """In bf16 there are 8 bits: positions 256 and 257 would be one."""
    model = stirred(GPT(TINY)).to(dtype)
    _, context = model.embed(torch.zeros(1, 16, dtype=torch.int64))
    assert context.rotation.dtype == torch.float32
    t = torch.arange(700, 708, dtype=torch.float64)[:, None]
    angles = t * 10_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    found = nanochat.rotation(TINY, 700, 8, torch.device("cpu"))
    torch.testing.assert_close(found.double(), torch.cat([angles.cos(), angles.sin()], 1),
                               rtol=0, atol=1e-4)
    torch.manual_seed(0)
    ids = torch.cat([*generate(model, torch.randint(65, (2, 5)), 30)], 1)
    assert ids.shape == (2, 30) and 0 <= ids.min() and ids.max() < 65


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_logits_are_within_their_cap(cap):
    model = stirred(GPT(GPTConfig(**asdict(TINY) | {"logit_cap": cap})))
    model.lm_head.weight.data *= 100
    largest = model.logits(torch.randint(65, (2, 16))).abs().max()
    assert largest <= cap if cap else largest > 3


# -- a third one -----------------------------------------------------------------------------

THIRD = '''"""GPT-2 with RMS norms."""

from gpt.gpt2 import Transformer as GPT2
from gpt.nanochat import RMSNorm


class Transformer(GPT2):
    """GPT-2's, with other norms."""

    def __init__(self, config, kernels):
        super().__init__(config, kernels)
        for block in self.h:
            block.ln_1, block.ln_2 = RMSNorm(kernels), RMSNorm(kernels)
        self.ln_f = RMSNorm(kernels)
'''
ROW = '    "third": Architecture("gpt.third", (), ties=True),\n'
ITS_TESTS = ["test_model.py", "test_sample.py::test_same_seed_same_text", "test_train.py::"
             "test_resume_is_bit_equal_with_dropout_accumulation_and_in_the_middle_of_an_epoch"]


def test_a_third_architecture_is_one_file_and_one_row(tmp_path):
    """In a copy of the code: it trains, resumes and writes text, and the tests run on it."""
    for name in ("common", "kernels", "data", "gpt", "train", "bench", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("__pycache__", "results", "*.bin"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "gpt" / "third.py").write_text(THIRD)
    config = tmp_path / "gpt" / "config.py"
    rows = re.search(r"^ARCHITECTURES = {\n(    .*\n)+", config.read_text(), re.M)[0]
    config.write_text(config.read_text().replace(rows, rows + ROW))
    tests = [f"{tmp_path / 'tests' / name}" for name in ITS_TESTS]
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:xdist", "-k", "third", *tests],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    said = done.stdout[-3000:] + done.stderr[-1000:]
    assert done.returncode == 0, said
    assert int(re.search(r"(\d+) passed", said)[1]) > 15 and "skipped" not in said
