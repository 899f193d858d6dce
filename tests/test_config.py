import dataclasses

import pytest

from configs import quickstart, shakespeare_char, train_gpt2
from train import run
from train.config import Config, changed, flatten, load_file, parse, unflatten

# nanoGPT's train.py. What we resolve ourselves (device, dtype, compile, backend) is "auto" here.
NANOGPT = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "dataset": "openwebtext", "gradient_accumulation_steps": 40,
    "batch_size": 12, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "device": "auto", "dtype": "auto",
    "compile": "auto", "backend": "auto", "wandb_log": False, "wandb_project": "owt", "wandb_run_name": "gpt2",
}


def test_defaults_are_nanogpts():
    ours = dict(flatten(Config()))
    assert {k: ours[k] for k in NANOGPT} == NANOGPT


def test_leaf_names_are_unique():
    names = [name for name, _ in flatten(Config())]
    assert len(names) == len(set(names)) <= 60


def test_command_line_overrides_the_file():
    config = parse(["shakespeare_char", "--n_layer=3", "--learning_rate=1", "--bias=True", "--compile=False", "--max_iters", "7"])
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
    for forward, name in ((shakespeare_char.config, "shakespeare_char_backward"), (train_gpt2.config, "train_gpt2_backward")):
        assert changed(load_file(name), forward).keys() == {"direction", "out_dir"}
    assert load_file("configs/quickstart.py") == load_file("quickstart") == quickstart.config


@pytest.mark.parametrize(("argv", "message"), [
    (["--n_haed=3"], "unknown flag --n_haed; did you mean --n_head?"),
    (["--xyzzy=3"], "unknown flag --xyzzy; --help lists them all"),
    (["--n_head=5", "--n_embd=128"], "n_head=5 does not divide n_embd=128; nearest that do: [2, 4, 8]"),
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


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.seed = 1  # type: ignore[misc]
