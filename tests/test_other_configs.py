"""Config files of other projects give the Config that ours would."""

import dataclasses
from pathlib import Path

import pytest

from train.command_line import load_file, parse
from train.config import Config, changed, flatten
from train.other_configs import is_nanogpt, read_nanogpt

ROOT = Path(__file__).parents[1]

# What nanoGPT's six kinds of config files say, by name and value.
NANOGPT = {
    "train_gpt2": {"wandb_log": True, "wandb_project": "owt", "wandb_run_name": "gpt2-124M",
                   "batch_size": 12, "block_size": 1024,
                   "gradient_accumulation_steps": 40, "max_iters": 600000,
                   "lr_decay_iters": 600000, "eval_interval": 1000,
                   "eval_iters": 200, "log_interval": 10, "weight_decay": 0.1},
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char", "eval_interval": 250, "eval_iters": 200,
        "log_interval": 10,
        "always_save_checkpoint": False, "wandb_log": False, "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char", "gradient_accumulation_steps": 1, "batch_size": 64,
        "block_size": 256, "n_layer": 6,
        "n_head": 6, "n_embd": 384, "dropout": 0.2, "learning_rate": 1e-3, "max_iters": 5000,
        "lr_decay_iters": 5000,
        "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 100},
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare", "eval_interval": 5, "eval_iters": 40, "wandb_log": False,
        "wandb_project": "shakespeare",
        "dataset": "shakespeare", "init_from": "gpt2-xl", "always_save_checkpoint": False,
        "batch_size": 1,
        "gradient_accumulation_steps": 32, "max_iters": 20, "learning_rate": 3e-5,
        "decay_lr": False},
    **{f"eval_{size.replace('-', '_')}": {"batch_size": 8, "eval_iters": 500, "eval_only": True,
                                          "wandb_log": False, "init_from": size}
       for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpt_config_files_are_read(name, tmp_path, capsys):
    """With comments and arithmetic; a run name made from the clock is not executed."""
    lines = [f"{k} = {v!r} # a comment" for k, v in NANOGPT[name].items()]
    lines = [line.replace("gradient_accumulation_steps = 40",
                          "gradient_accumulation_steps = 5 * 8") for line in lines]
    if name == "finetune_shakespeare":
        lines = ["import time", *lines, "wandb_run_name = 'ft-' + str(time.time())"]
    (tmp_path / "config.py").write_text("\n".join(lines))
    config = load_file(str(tmp_path / "config.py"))
    assert {k: v for k, v in flatten(config) if k in NANOGPT[name]} == NANOGPT[name]
    assert changed(config).keys() <= NANOGPT[name].keys()
    assert ("wandb_run_name keeps its default" in capsys.readouterr().err) == (
        name == "finetune_shakespeare")


@pytest.mark.parametrize(("ours", "theirs"), [
    ("shakespeare_char", "train_shakespeare_char"), ("train_gpt2", "train_gpt2"),
    ("finetune_shakespeare", "finetune_shakespeare"),
    ("eval_gpt2", "eval_gpt2"), ("eval_gpt2_medium", "eval_gpt2_medium"),
    ("eval_gpt2_large", "eval_gpt2_large"),
    ("eval_gpt2_xl", "eval_gpt2_xl"),
])
def test_our_config_is_nanogpts(ours, theirs):
    said = {k: v for k, v in NANOGPT[theirs].items() if not k.startswith("wandb")}
    assert {k: v for k, v in flatten(load_file(ours)) if k in said} == said


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_says_its_tokens(file):
    config = load_file(str(file))
    assert isinstance(config, Config)
    if not config.run.eval_only:
        assert f"{config.tokens_per_iter:,} tokens a step" in file.read_text()


def said(source):
    """The settings that a nanoGPT config changes."""
    return {
        name: value for name, (_, value) in changed(read_nanogpt(source, Path("config.py"))).items()
    }


def test_code_in_a_nanogpt_config_is_never_run(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "config.py").write_text(f"batch_size = {code}\nprint('x')\n")
    assert load_file(str(tmp_path / "config.py")) == Config()
    with pytest.raises(ValueError, match="line 1: `open"):
        said(code)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("batch_size: int = 7", {"batch_size": 7}),
        ("batch_size: int", {}),
        ("block_size, n_head = 8, 2", {"block_size": 8, "n_head": 2}),
        ("(n_head, [block_size, n_embd]) = 2, [8, 4]", {"n_head": 2, "block_size": 8, "n_embd": 4}),
        ("max_iters += 2", {"max_iters": 600_002}),
        ("max_iters = 6\nmax_iters *= 2", {"max_iters": 12}),
        ("batch_size = n_head = 3", {"batch_size": 3, "n_head": 3}),
        (
            "learning_rate = 1e-3\nmin_lr = learning_rate / 10",
            {"learning_rate": 1e-3, "min_lr": 1e-4},
        ),
        ("n_head = n_layer * 2", {"n_head": 24}),
        ("n = 6\nn_layer = n", {"n_layer": 6}),
        ("out_dir = f'out-{dataset}-{n_layer}'", {"out_dir": "out-openwebtext-12"}),
        ("out_dir = 'out-' + dataset", {"out_dir": "out-openwebtext"}),
        ('"""A text."""\nimport time\nprint(\'hi\')\npass', {}),
        ("backward = True", {"direction": "backward"}),
        ("backward = False", {}),
    ],
)
def test_plain_assignments_are_read(source, settings):
    """All but `name = value` were dropped without a word."""
    assert said(source) == settings


@pytest.mark.parametrize(
    "statement",
    [
        "if True:",
        "for i in range(3):",
        "with x:",
        "while True:",
        "def f():",
        "class C:",
        "try:",
        "del n_head",
        "assert n_head",
        "from base import *",
        "from base import n_head",
        "import x as n_head",
        "n_head.x = 3",
        "n_head[0] = 3",
        "a, *b = 1, 2",
        "a, b = 1",
        "exec('n_head = 3')",
        "print(exec('n_head = 3'))",
        "globals()['n_head'] = 3",
        "globals().update(n_head=3)",
        "x = (n_head := 3)",
        "print(n_head := 3)",
        "vars()['n_head'] = 3",
    ],
)
def test_what_could_change_a_setting_otherwise_is_refused(statement):
    body = "\n    n_head = 3" if statement.endswith(":") else ""
    source = f"batch_size = 3\n{statement}{body}" + "\nfinally:\n    pass" * (statement == "try:")
    refusal = "line 2: `.*` is not read; write plain assignments, or a config of ours"
    with pytest.raises(ValueError, match=refusal):
        said(source)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9 ** 9 ** 9", "exponent beyond 64"),
        ("'a' * 10 ** 9", "neither arithmetic"),
        ("2 ** 64", "too large"),
        ("1e300 * 1e300", "too large"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "cannot be raised"),
        ("'a' + 1", "neither arithmetic"),
        ("(-8) ** 0.5", "too large"),
        ("10.0 ** 64 ** 2", "beyond 64"),
        ("+".join(["1"] * 900), "nested too deep"),
        ("-" * 9000 + "1", "nested too deep"),
        ("(", "was never closed"),
        ("\0", "null bytes"),
        ("'a\nb", "unterminated"),
        ("None", "n_layer=None; a text, a number"),
        ("[1, 2]", "n_layer=(1, 2)"),
    ],
)
def test_bad_values_are_one_line(value, message):
    """They were tracebacks; 9 ** 9 ** 9 was computed for hours."""
    with pytest.raises(ValueError) as caught:
        said(f"n_layer = {value}")
    assert (
        str(caught.value).startswith("config.py")
        and message in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "value", ["max(1, 2)", "1 << 3", "3 if True else 4", "unknown", "{n_head:9999999}"]
)
def test_what_is_computed_otherwise_is_said_and_nothing_comes_of_it(value, capsys):
    text = f"f'{value}'" if value.startswith("{") else value
    assert said(f"n_layer = 5\nn_layer = {text}\nmax_iters = 10 * n_layer") == {}
    err = capsys.readouterr().err
    assert (
        f"config.py, line 2: n_layer keeps its default, `{value}` is not read" in err
        and "line 3: max_iters keeps its default" in err
    )


@pytest.mark.parametrize(
    ("source", "ours"),
    [
        ("config: Config = Config()", True),
        ("config = Config()", True),
        ("a, config = 1, Config()", True),
        ("from configs.x import config", True),
        ("if True:\n    config = Config()", True),
        ("batch_size = 3", False),
        ("x = config", False),
        ("", False),
    ],
)
def test_a_config_of_ours_gives_a_config(source, ours):
    """An annotated one was taken for nanoGPT's, and all of it ignored."""
    assert is_nanogpt(source, Path("config.py")) != ours


@pytest.mark.parametrize("value", ["1", "'yes'", "None"])
def test_backward_is_a_bool(value):
    with pytest.raises(ValueError, match="backward="):
        said(f"backward = {value}")
    with pytest.raises(ValueError, match="direction alone"):
        said("backward = True\ndirection = 'forward'")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n_haed = 3", "unknown setting 'n_haed'; did you mean --n_head?"),
        ("n_layer = 'six'", "n_layer='six' is a str; a int is needed"),
        ("bias = 'False'", "bias='False' is a str; a bool is needed"),
        ("learning_rate = 'high'", "learning_rate='high' is no number"),
    ],
)
def test_wrong_lines_are_named(line, message, tmp_path):
    (tmp_path / "config.py").write_text(line)
    with pytest.raises(ValueError, match="config.py: ") as caught:
        load_file(str(tmp_path / "config.py"))
    assert message in str(caught.value)


def test_stitch_llms_command_line_reads_backwards():
    assert parse(["--backward=True"]) == parse(["--direction=backward"]) != Config()
    assert parse(["--backward=False"]) == Config()


@pytest.fixture
def yaml_folder(tmp_path):
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    for name, text in {
        "train.yaml": "defaults:\n  - system: cpu\n  - model: small\n  - data: chars\n  - "
                      "algorithm: adamw\n  - _self_\n"
                      "algorithm:\n  max_iters: 100\n",
        "system/cpu.yaml": "device: cpu\ncompile: false\nout_dir: out-${data.dataset}\n",
        "model/small.yaml": "n_layer: 2\nn_head: 2\nn_embd: 32\n",
        "model/large.yaml": "n_layer: 4\nn_head: 4\nn_embd: 64\n",
        "data/chars.yaml": "dataset: shakespeare_char\nbatch_size: 8\nblock_size: 64\n",
        "algorithm/adamw.yaml": "learning_rate: 6e-4\nmin_lr: 6e-5\nmax_iters: "
                                "5000\nlr_decay_iters: ${.max_iters}\nwarmup_iters: 10\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_composed_yaml_is_the_hand_written_config(yaml_folder):
    config = parse([f"--config-path={yaml_folder}", "--config-name=train", "model=large",
                    "+algorithm.beta2=0.99"])
    base = Config()
    by_hand = Config(
        model=dataclasses.replace(base.model, n_layer=4, n_head=4, n_embd=64, block_size=64),
        data=dataclasses.replace(base.data, dataset="shakespeare_char", batch_size=8),
        optim=dataclasses.replace(base.optim, learning_rate=6e-4, min_lr=6e-5, max_iters=100,
                                  lr_decay_iters=100, warmup_iters=10, beta2=0.99),
        run=dataclasses.replace(base.run, device="cpu", compile=False,
                                out_dir="out-shakespeare_char"),
    )
    assert config == by_hand
    assert isinstance(config.optim.learning_rate, float)


@pytest.mark.parametrize(("argv", "message"), [
    (["--config-name=nothing"], "nothing"), (["--config-name=train", "model.n_haed=3"], "n_haed"),
    (["--config-name=train", "+model.dataset=x"], "dataset is given twice"),
    (["--config-name=train", "--n_layer=3"], "override as in hydra"),
])
def test_wrong_yaml_is_one_line(argv, message, yaml_folder):
    with pytest.raises(ValueError, match=message) as caught:
        parse([f"--config-path={yaml_folder}", *argv])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "3",
        "text",
        "n_layer: [1, 2",
        "\tn_layer: 3",
        "n_layer: null",
        "device: null",
        "device: [cpu]",
        "1: 3",
        "null: 3",
        "model: {n_layer: {x: 3}}",
        "n_layer: 3\nn_layer: 4",
        "defaults: 3",
        "defaults: [{}]",
        "n_layer: ${x}",
        "n_layer: ${n_layer}",
        "a: !!python/object/apply:os.getcwd []",
        "backward: 'yes'",
        "backward: true\ndirection: forward",
        "? [a]\n: 3",
        "[" * 3000,
        "x: &a [*a]",
        "\0",
        b"n_layer: \xff",
    ],
)
def test_bad_yaml_is_one_line(text, yaml_folder):
    """A list at the top was a failed assertion, a null a crash, a bad file a traceback."""
    (yaml_folder / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        parse([f"--config-path={yaml_folder}", "--config-name=bad"])
    assert "bad" in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_may_say_backward(yaml_folder):
    (yaml_folder / "bw.yaml").write_text("model:\n  backward: true\n")
    assert parse([f"--config-path={yaml_folder}", "--config-name=bw"]).model.direction == "backward"
