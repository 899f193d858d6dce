import dataclasses
import os

import pytest

from configs import quickstart, shakespeare_char, train_gpt2
from train import run
from train.command_line import load_file, parse
from train.config import Config, changed, flatten, unflatten

# nanoGPT's train.py. What we resolve ourselves (device, dtype, compile, backend) is "auto" here.
NANOGPT = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768,
    "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5,
    "device": "auto", "dtype": "auto",
    "compile": "auto", "backend": "auto", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2",
}


def test_defaults_are_nanogpts():
    ours = dict(flatten(Config()))
    assert {k: ours[k] for k in NANOGPT} == NANOGPT


def test_leaf_names_are_unique():
    names = [name for name, _ in flatten(Config())]
    assert len(names) == len(set(names)) <= 69


def test_command_line_overrides_the_file():
    config = parse(["shakespeare_char", "--n_layer=3", "--learning_rate=1", "--bias=True",
                    "--compile=False", "--max_iters", "7"])
    assert config.model.n_layer == 3 and config.model.n_embd == 384
    assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
    assert (config.model.bias, config.run.compile, config.optim.max_iters) == (True, False, 7)
    assert parse(["--compile=auto"]).run.compile == "auto"


def test_flatten_and_unflatten_are_inverse():
    config = parse(["quickstart", "--seed=3"])
    assert unflatten(dict(flatten(config))) == config
    assert changed(config, quickstart.config) == {"seed": (1337, 3)}
    with pytest.raises(ValueError, match="unknown setting 'n_haed'; did you mean --n_head"):
        unflatten({"n_haed": 3})


def test_shipped_configs():
    assert train_gpt2.config.tokens_per_iter == 491_520
    assert shakespeare_char.config.tokens_per_iter == 16_384
    for forward, name in ((shakespeare_char.config, "shakespeare_char_backward"),
                          (train_gpt2.config, "train_gpt2_backward")):
        assert changed(load_file(name), forward).keys() == {"direction", "out_dir"}
    assert load_file("configs/quickstart.py") == load_file("quickstart") == quickstart.config


@pytest.mark.parametrize(("argv", "message"), [
    (["--n_haed=3"], "unknown flag --n_haed; did you mean --n_head?"),
    (["--xyzzy=3"], "unknown flag --xyzzy; --help lists them all"),
    (["--n_head=5", "--n_embd=128"],
     "n_head=5 does not divide n_embd=128; nearest that do: [2, 4, 8]"),
    (["--n_head=x"], "--n_head: invalid literal"),
    (["--bias=maybe"], "--bias"),
    (["--batch_size=0"], "batch_size=0: must be at least 1"),
    (["--dropout=1.0"], "dropout=1.0"),
    (["--lr_decay_iters=5"], "lr_decay_iters=5 must be more than warmup_iters=2000"),
    (["nonsense"], "no config file 'nonsense'; configs/ has"),
    (["quickstart", "train_gpt2"], "more than one config file"),
    (["README.md"], "README.md"),
    (["--device=tpu", "quickstart"], "--device=tpu: choose auto, cuda, cuda:N, mps or cpu"),
    (["--init_from=nothing", "--device=cpu"], "--data_dir"),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("not = 'a config'\n")
    if message == "--data_dir":  # whatever else is wrong, the folder without data is named
        argv, message = [*argv, f"--data_dir={tmp_path}"], f"{tmp_path}/train.bin: no such file"
    assert run.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md"]


@pytest.mark.parametrize("flag", [
    "min_lr=-1", "weight_decay=-1", "weight_decay=nan", "learning_rate=inf", "beta1=1",
    "beta2=-0.1", "momentum=nan", "dropout=nan", "grad_clip=-1", "seed=-1", "max_iters=-1",
    "seed=18446744073709551616", "eval_iters=0", "n_embd=1000000000000", "n_layer=0",
    "vocab_size=-1", "hang_timeout=99999999999", "out_dir=", "init_from=", "lr_decay_iters=-1",
    "stitch_layer_index=-2", "window=-1",
])
def test_senseless_values_are_refused_at_the_start(flag, capsys, tmp_path, monkeypatch):
    """--min_lr=-1 trained to a loss of 852; --n_embd=1000000000000 never ended."""
    monkeypatch.chdir(tmp_path)
    assert run.main([f"--{flag}", "--device=cpu", "--dtype=float32"]) == 2
    err, name = capsys.readouterr().err, flag.partition("=")[0]
    assert err.startswith(f"error: {name}=") and ": must " in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


IMPORTED = b"from train.config import *\nconfig = "


@pytest.mark.parametrize(("content", "says"), [
    (b"config = (", "line 1: '(' was never closed"),
    (b"x = 1\nconfig = \xff", "not UTF-8 at byte 15"),
    (b"config = 0\0", "source code string cannot contain null bytes"),
    (b"(" * 10000, "too many nested"),
    (b"\nconfig = missing", "line 2: NameError: name 'missing' is not defined"),
    (b"config = 3", "its `config` is not a Config"),
    (b"import nowhere\nconfig = 1", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
    (b"config = 1 / 0", "line 1: ZeroDivisionError"),
    (b"raise SystemExit(3)\nconfig = 1", "line 1: SystemExit: 3"),
    (IMPORTED + b"Config(\n    data=DataConfig(batch_size=0))", "line 2: batch_size=0: must be at"),
    (IMPORTED + b"Config(data=DataConfig(batch_size='x'))", "line 2: TypeError: '>='"),
    (b"optimizer = 'sdg'",
     "optimizer='sdg' is a str; Literal['adamw', 'adam', 'sgd', 'muon'] is needed"),
    (b"learning_rate = 1" + b"0" * 400, " is no number"), (b"compile = 3", "compile=3 is a int; "),
])
def test_a_broken_config_file_is_one_line(content, says, capsys, tmp_path):
    """Each of these was a traceback, or was taken."""
    (tmp_path / "mine.py").write_bytes(content)
    assert run.main([str(tmp_path / "mine.py")]) == 2
    err = capsys.readouterr().err
    assert says in err and f"{tmp_path / 'mine.py'}" in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_config_that_is_no_file_is_not_waited_for(kind, capsys, tmp_path):
    kind(tmp_path / "mine.py")
    assert run.main([str(tmp_path / "mine.py")]) == 2
    assert "no config file" in capsys.readouterr().err


def test_a_config_may_say_its_type(tmp_path):
    """`config: Config = ...` was read as nanoGPT's, where it says nothing: the defaults trained."""
    content = b"from train.config import *\nconfig: Config = Config(optim=OptimConfig(max_iters=7))"
    (tmp_path / "mine.py").write_bytes(content)
    assert load_file(str(tmp_path / "mine.py")).optim.max_iters == 7


def test_a_value_may_be_spelt_like_the_config():
    """The value was taken out of the command line together with the config's name."""
    config = parse(["quickstart", "--wandb_run_name", "quickstart"])
    assert config.run.wandb_run_name == "quickstart"


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.seed = 1  # type: ignore[misc]
