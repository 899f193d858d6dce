"""What each ingredient brings (bench/ablation.py, bench/curves/). On a CPU, in float32."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import ablation, report
from bench.ablation import ADDED, REMOVED, Options, plain_of, recipe_of, settings
from bench.curves import contestants, variant_run
from bench.curves.variants import VARIANTS, registered, rotated
from gpt import GPT, GPTConfig
from gpt.config import ARCHITECTURES
from gpt.nanochat import rotation
from kernels import load, reference
from train import run

SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=29)
IDX = torch.arange(12)[None] * 5 % 29
CONFIG = "configs/macbook.py --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4"


def model(variant="", architecture="nanochat", **changes):
    torch.manual_seed(0)
    with registered(variant):
        built = GPT(GPTConfig(architecture=architecture, **SIZES | changes), load("reference"))
    return built.eval()


def randomised(built):
    """With weights that matter: c_proj and the head begin at 0, or nearly."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    return built


def last_logits(built, idx=IDX):
    with torch.no_grad():
        return built.logits(idx)[0, -1]


def names(built):
    return {name for name, _ in built.named_parameters()}


# -- the variants --------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_is_not_the_base(variant, tiny_flags, tmp_path):
    architecture = VARIANTS[variant].architecture
    flags = [*tiny_flags, f"--architecture={architecture}", "--dropout=0", "--max_iters=2",
             "--eval_interval=2"]
    losses = []
    for main, argv in ((variant_run.main, [variant, *flags]), (run.main, flags)):
        assert main([*argv, f"--out_dir={tmp_path / str(len(losses))}"]) == 0
        log = (tmp_path / str(len(losses)) / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(log[-1])["val/loss"])
    assert losses[0] != losses[1] and 3 < losses[0] < 3.5


def test_a_variant_is_built_only_where_it_is_registered():
    before = dict(ARCHITECTURES)
    assert "transformer.wpe.weight" in names(model("learned-positions"))
    assert "transformer.wpe.weight" not in names(model()) and ARCHITECTURES == before
    with pytest.raises(ZeroDivisionError), registered("gelu"):
        raise ZeroDivisionError
    assert ARCHITECTURES == before


@pytest.mark.parametrize(("variant", "architecture", "table"), [
    ("learned-positions", "nanochat", True), ("rotary-positions", "gpt2", False)])
def test_positions_come_from_the_table_or_from_the_rotation(variant, architecture, table):
    """Where neither says the order, one layer's last token cannot tell that of those before."""
    built, other = randomised(model(variant, architecture)), IDX.clone()
    other[0, [1, 7]] = IDX[0, [7, 1]]
    assert ("transformer.wpe.weight" in names(built)) == table
    assert (last_logits(built) - last_logits(built, other)).abs().max() > 1e-3
    if table:
        torch.nn.init.zeros_(built.transformer.wpe.weight)
    else:
        still = torch.cat([torch.ones(12, 4), torch.zeros(12, 4)], 1)
        embed = built.transformer.embed
        built.transformer.embed = lambda idx, start: (embed(idx, start)[0], still)
    torch.testing.assert_close(last_logits(built), last_logits(built, other))


def test_queries_and_keys_are_rotated_and_not_normalised():
    """The length of q and k decides how sharp attention is; the base is blind to it."""
    qkv = torch.randn(2, 12, 3, 2, 8)
    angles = rotation(GPTConfig(architecture="nanochat", **SIZES), 0, 12, torch.device("cpu"))
    got, normal = rotated(qkv, angles), reference.rotated_qkv(qkv, angles)
    torch.testing.assert_close(reference.rmsnorm(got[:, :, :2]), normal[:, :, :2])
    torch.testing.assert_close(got[:, :, :2].norm(dim=-1), qkv[:, :, :2].norm(dim=-1))
    assert torch.equal(got[:, :, 2], qkv[:, :, 2])
    for variant, sees in (("plain-queries", True), ("", False)):
        built = randomised(model(variant))
        before = last_logits(built)
        with torch.no_grad():
            built.transformer.h[0].attn.c_attn.weight[:32] *= 4
        assert ((last_logits(built) - before).abs().max() > 1e-3) == sees


def test_layer_norms_have_weights_and_take_the_mean_away():
    built = model("layer-norms")
    added = names(built) - names(model())
    assert added == {f"transformer.{name}.weight" for name in
                     ("ln_e", "ln_f", "h.0.ln_1", "h.0.ln_2")}
    x = torch.randn(3, 16) + 2
    for norm in (built.transformer.ln_e, built.transformer.h[0].ln_1, built.transformer.ln_f):
        assert norm(x)[1].mean(-1).abs().max() < 1e-5


def test_the_other_variants_change_one_thing():
    base, gelu, starts = model(), model("gelu"), model("random-starts")
    assert gelu.transformer.h[0].mlp.activation is F.gelu
    assert gelu.transformer.h[0].mlp.activation is not base.transformer.h[0].mlp.activation
    for name, p in starts.named_parameters():
        if name.endswith("c_proj.weight"):
            assert base.get_parameter(name).abs().max() == 0
            assert p.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.15)
    plain = model("plain-embedding")
    rms = [m.transformer.embed(IDX, 0)[0].square().mean().sqrt().item() for m in (base, plain)]
    assert rms[0] == pytest.approx(1, rel=1e-3) and rms[1] == pytest.approx(0.8, rel=0.2)


# -- the recipes ---------------------------------------------------------------


def test_each_removal_changes_its_setting_alone():
    whole = recipe_of(Options(config=CONFIG))
    changed = {}
    for ingredient in REMOVED:
        other = whole.but(ingredient, "x")
        assert ablation.differs(other, whole), ingredient.name
        assert (other.variant != "") == (not ingredient.flags)
        changed[ingredient.name] = {k: v for k, v in settings(other).items()
                                    if v != settings(whole)[k]}
    assert [value for value in changed.values() if value] == [
        {"optimizer": "adamw"}, {"tie_weights": True}, {"logit_cap": 0.0}, {"schedule": "cosine"},
        {"embedding_lr": 0.0}]


def test_gpt2s_recipe_has_the_size_and_tokens_of_the_whole_one():
    whole = recipe_of(Options(config=f"{CONFIG} --rope_theta=500 --logit_cap=20", max_iters=40))
    plain = plain_of(whole)
    for name in ("n_layer", "n_embd", "block_size", "batch_size", "max_iters", "lr_decay_iters"):
        assert settings(plain)[name] == settings(whole)[name]
    c = plain.config
    assert (c.model.architecture, c.model.tied, c.optim.optimizer) == ("gpt2", True, "adamw")
    assert (c.optim.schedule, c.optim.embedding_lr, c.optim.warmup_iters) == ("cosine", 0.0, 2)
    muon, rotary, trapezoid = (plain.but(ingredient, "x") for ingredient in ADDED)
    assert muon.config.optim.muon_lr == whole.config.optim.muon_lr == 0.04
    assert rotary.variant and rotary.config == c
    assert trapezoid.config.optim.schedule == "trapezoid"


def test_a_warm_up_shrinks_with_the_run():
    longer = f"{CONFIG} --warmup_iters=50"
    assert recipe_of(Options(config=longer)).config.optim.warmup_iters == 50
    optim = recipe_of(Options(config=longer, max_iters=10)).config.optim
    assert (optim.warmup_iters, optim.lr_decay_iters, optim.max_iters) == (2, 10, 10)


# -- the whole bench -----------------------------------------------------------


@pytest.fixture
def options(tiny_data, tmp_path):
    return Options(config=CONFIG, data_dir=str(tiny_data), max_iters=4, rates="0.001,0.002,0.004",
                   seeds="1,2", each=1, work=str(tmp_path / "work"), out=str(tmp_path / "r.json"))


@pytest.fixture
def launched(monkeypatch):
    """No trainer runs: its log is written, and the names of the folders are noted.

    The loss is 2 but for seed 2, 0.1 more; 3 without ReLU squared; 1.9 with Muon alone; it depends
    on AdamW's rate, and 0.002 is best.
    """
    folders = []

    def launch(command, folder, place):
        folders.append(place.name.rsplit("-", 1)[0])
        lines = [f"step {i}: train loss 3.0, val loss 3.0" for i in (0, 4)]
        lines += [f"iter {i}: loss 3.0, time 10.00ms, mfu 1%" for i in range(4)]
        (place / "log.txt").write_text("\n".join(lines))
        return 7.0

    def final_loss(recipe, data, out):
        loss = 2.0 + 0.1 * (out.parent.name.rsplit("-", 2)[1] == "2")
        loss += recipe.name == "without ReLU squared"
        loss -= 0.5 * (recipe.name == "Muon alone")
        c = recipe.config.optim
        return loss + (c.optimizer == "adamw") * 100 * abs(c.learning_rate - 0.002)

    monkeypatch.setattr(contestants, "launch", launch)
    monkeypatch.setattr(contestants, "final_loss", final_loss)
    return folders


def test_rows_are_sorted_and_noise_is_told(options, launched, capsys):
    ablation.main(options)
    found = json.loads(open(options.out).read())
    assert len(launched) == len(set(launched)) == 2 + 2 + len(REMOVED) + 3 + 1 + len(ADDED)
    base, rows = found["without"]["base"], found["without"]["rows"]
    assert base["loss"] == pytest.approx(2.05) and base["spread"] == pytest.approx(0.1)
    assert base["runs"].keys() == {"1", "2"} and base["steps"] == 4
    assert {name: len(row["runs"]) for name, row in rows.items()} == {i.name: 1 for i in REMOVED}
    first, *rest = rows.items()
    assert first[0] == "ReLU squared" and first[1]["minus_base"] == pytest.approx(1.0)
    assert not first[1]["within_noise"]
    assert all(row["within_noise"] and abs(row["minus_base"]) < 1e-9 for _, row in rest)
    assert rows["Muon"]["rates"] == {"0.001": pytest.approx(2.1), "0.002": pytest.approx(2.0),
                                     "0.004": pytest.approx(2.2)}
    assert "--learning_rate=0.002 --min_lr=0.0" in rows["Muon"]["command"]
    plain = found["plain"]
    assert "--learning_rate=0.002 --min_lr=0.0002" in plain["base"]["command"]
    assert next(iter(plain["rows"])) == "Muon"
    assert plain["rows"]["Muon"]["minus_base"] == pytest.approx(-0.5)
    assert plain["rows"]["rotary positions"]["command"].startswith(
        "python bench/curves/variant_run.py rotary-positions configs/macbook.py ")
    assert found["environment"]["threads"] and found["config"]["n_embd"] == 16
    assert "warning" not in capsys.readouterr().out
    lines = report.ablation(found).splitlines()
    assert "| the whole recipe | 2.050 (2.000 to 2.100) | | 0.0 |" in lines
    assert "| without ReLU squared: GELU | 3.000 | +1.000 | 0.0 |" == lines[3]
    assert "| without Muon: AdamW at 0.002 | 2.000 | +0.000, within noise | 0.0 |" in lines
    assert "| with Muon: in place of AdamW | 1.500 | -0.500 | 0.0 |" in lines


def test_a_finished_run_is_kept_and_one_of_another_variant_is_not(options, launched, monkeypatch,
                                                                  tmp_path):
    def again(**changes):
        launched.clear()
        ablation.main(replace(options, **changes))
        return launched

    assert len(again()) > 10
    assert again() == []
    assert again(seeds="1,3") == ["the-whole-recipe-3", "gpt-2-s-recipe-rate-0.002-3"]
    (tmp_path / "variants.py").write_text("# changed")
    monkeypatch.setattr(ablation.variants, "__file__", str(tmp_path / "variants.py"))
    assert len(again()) == len(VARIANTS), "flags alone make the others"


def test_what_the_config_has_not_is_left_out_and_an_end_of_the_rates_told(options, launched,
                                                                          capsys):
    ablation.main(replace(options, config=f"{CONFIG} --logit_cap=0", rates="0.002,0.004"))
    found, told = json.loads(open(options.out).read()), capsys.readouterr().out
    assert "configs/macbook.py has no cap of the logits: left out" in told
    assert found["without"]["rows"].keys() == {i.name for i in REMOVED} - {"cap of the logits"}
    assert "warning: 0.002 is the best of --rates, and at their end" in told


def test_a_run_and_a_variants_run_end_to_end(options, tiny_data):
    """The trainer's own process, its checkpoint evaluated here."""
    recipe = recipe_of(options)
    bench = ablation.Bench(tiny_data, ablation.Path(options.work), [1, 2], 1, [0.1])
    positions = recipe.but(REMOVED[1], "learned positions")
    losses = [bench.losses(r, [1])["1"] for r in (recipe, positions)]
    assert losses[0]["loss"] != losses[1]["loss"]
    for found in losses:
        assert 1 < found["loss"] < 3.6 and found["training_s"] > 0


@pytest.mark.parametrize(("flags", "told"), [
    (["--seeds=1"], "--seeds=1: give two or more"),
    (["--seeds=1,one"], "numbers with commas"),
    (["--rates="], "--rates=: give one or more"),
    (["--rates=0"], "each above 0"),
    (["--each=0"], "each=0: must be"),
    (["--max_iters=1"], "max_iters=1: give 2 or more"),
    (["--data_dir=nowhere"], "nowhere/val.bin: no such file"),
    (["--config=configs/nothing.py"], "no config file 'configs/nothing.py'"),
    (["--config=configs/train_gpt2.py"], "architecture=gpt2; the recipe to take apart"),
    ([f"--config={CONFIG} --optimizer=adamw"], "optimizer=adamw; the recipe to take apart"),
    (["--config= "], "--config= : name a config"),
    ([f"--config={CONFIG} --n_layers=2"], "unknown flag --n_layers"),
    (["--dtype=float16"], "float16"),
])
def test_what_is_wrong_is_one_line_and_code_2(flags, told, options, launched, capsys):
    given = [f"--{name}={getattr(options, name)}" for name in
             ("config", "data_dir", "max_iters", "work", "out")]
    assert ablation.cli.run(ablation.main, Options, [*given, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error and not launched


@pytest.mark.parametrize(("argv", "told"), [
    ([], "no variant is named"), (["swiglu"], "no variant 'swiglu'; choose from learned"),
    (["gelu", "--n_layer=0"], "n_layer=0"),
])
def test_a_variant_that_is_not_there_is_one_line(argv, told, capsys):
    assert variant_run.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error
