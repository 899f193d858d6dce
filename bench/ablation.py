"""What each ingredient of the modern recipe brings: the run without it, beside the whole recipe.

    python bench/ablation.py                                # configs/macbook.py
    python bench/ablation.py --config=configs/quickstart.py
    python bench/ablation.py --max_iters=10 --out=try.json  # to try the command

First the recipe of --config with one ingredient less at a time, then GPT-2's recipe at the same
size, on the same tokens, with one ingredient more. A run's loss is that of the whole validation
split, in fp32, by train/evaluate.py. What it costs to remove an ingredient is the mean over seeds
of the loss without it minus the recipe's from the same seed. Where that is at most twice the
spread, the largest minus the smallest loss of the unchanged recipe, it is within noise.

- AdamW in place of Muon has one rate for the matrices and the head, as it has in GPT-2's recipe;
  each takes the best of --rates for the first seed. The other ingredients are not tuned again.
- What no flag of train/run.py does is a variant of bench/curves/variants.py.

A finished run is kept in --work, and taken again if its command, code, data and machine are the
same. Runs follow each other, on the CPU, without torch.compile. Exit code: 0; 2 for bad input, or
if a run fails.
"""

import hashlib
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from bench.curves import variants
from bench.curves.contestants import Contestant, run
from bench.curves.variants import registered
from bench.options import numbers
from bench.timing import ROOT, environment, result_path, write_result
from common import cli
from common.bounds import NonNegative, NotEmpty, Positive
from data.tokens import open_split
from train.config import flatten


@dataclass(frozen=True)
class Options:
    """Train the recipe with one ingredient less, and GPT-2's with one more."""

    config: NotEmpty = "configs/macbook.py"
    """config and flags of the recipe, as train/run.py takes them"""
    data_dir: str = ""
    """folder of tokens; empty: the config's"""
    max_iters: NonNegative = 0
    """steps, in which the rate decays too; warm-up shrinks with them; 0: the config's"""
    rates: str = "0.001,0.002,0.004,0.01"
    """learning rates to try for AdamW, with commas"""
    seeds: str = "1337,1338,1339"
    """of the whole recipe and of GPT-2's: two or more, with commas"""
    each: Positive = 2
    """the first so many seeds for every other run"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    work: str = ""
    """folder of the runs; empty: out-ablation"""
    out: str = ""
    """JSON file for the result; empty: bench/results/ablation-NAME.json, NAME the config's"""


class Ingredient(NamedTuple):
    """A row: what is removed or added, and how."""

    name: str
    then: str
    """what takes its place, or whose place it takes; empty: nothing"""
    flags: tuple[str, ...] = ()
    variant: str = ""
    rated: bool = False
    """whether --rates are tried"""


REMOVED = (
    Ingredient("Muon", "AdamW", ("--optimizer=adamw",), rated=True),
    Ingredient("rotary positions", "learned positions", variant="learned-positions"),
    Ingredient("norms of q and k", "", variant="plain-queries"),
    Ingredient("RMS norms", "layer norms with weights", variant="layer-norms"),
    Ingredient("ReLU squared", "GELU", variant="gelu"),
    Ingredient("zero starts", "GPT-2's random ones", variant="random-starts"),
    Ingredient("norm after the embedding", "", variant="plain-embedding"),
    Ingredient("untied head", "the embedding is the head", ("--tie_weights=True",)),
    Ingredient("cap of the logits", "", ("--logit_cap=0",)),
    Ingredient("trapezoid", "cosine", ("--schedule=cosine",)),
    Ingredient("the embedding's own rate", "the head's", ("--embedding_lr=0",)),
)
# GPT-2's, with the betas, decay and clipping of nanoGPT's small runs, and a twentieth of warm-up
PLAIN = ("--architecture=gpt2", "--logit_cap=15", "--rope_theta=10000", "--tie_weights=auto",
         "--optimizer=adamw", "--embedding_lr=0", "--schedule=cosine", "--beta1=0.9",
         "--beta2=0.99", "--weight_decay=0.1", "--grad_clip=1.0")
ADDED = (
    Ingredient("Muon", "in place of AdamW", ("--optimizer=muon",)),
    Ingredient("rotary positions", "in place of learned ones", variant="rotary-positions"),
    Ingredient("trapezoid", "in place of cosine", ("--schedule=trapezoid",)),
)


@dataclass(frozen=True)
class Recipe(Contestant):
    """A run of train/run.py, or of a variant."""

    variant: str = ""

    @property
    def script(self) -> str:
        return "bench/curves/variant_run.py" if self.variant else "train/run.py"

    def command(self, seed: int, data: Path, out: Path) -> list[str]:
        python, script, *rest = super().command(seed, data, out)
        return [python, script, *([self.variant] if self.variant else []), *rest]

    def identity(self, seed: int, data: Path, machine: dict[str, Any]) -> dict[str, Any]:
        source = Path(variants.__file__).read_bytes() if self.variant else b""
        return super().identity(seed, data, machine) | {
            "variants": hashlib.sha256(source).hexdigest()}

    def described(self) -> dict[str, Any]:
        variant = [self.variant] if self.variant else []
        return super().described() | {
            "command": shlex.join(["python", self.script, *variant, *self.words])}

    def but(self, ingredient: Ingredient, name: str) -> "Recipe":
        """This recipe with an ingredient's flags or variant."""
        return Recipe(name, (*self.words, *ingredient.flags), variant=ingredient.variant)

    def at(self, rate: float, min_lr: float) -> "Recipe":
        """This recipe with another learning rate."""
        flags = (f"--learning_rate={rate!r}", f"--min_lr={min_lr!r}")
        return replace(self, name=f"{self.name}, rate {rate:g}", words=(*self.words, *flags))


@dataclass
class Bench:
    """Where runs are made and kept."""

    data: Path
    work: Path
    seeds: list[int]
    each: int
    rates: list[float]

    def losses(self, recipe: Recipe, seeds: list[int]) -> dict[str, dict[str, float]]:
        """What the result has of the recipe's run from each seed."""
        found = {}
        for seed in seeds:
            print(f"{recipe.name}, seed {seed}", flush=True)
            try:
                with registered(recipe.variant):  # its checkpoint is evaluated in this process
                    ran = run(recipe, seed, self.data, self.work)
            except ValueError as error:
                raise ValueError(f"{recipe.name}, seed {seed}: {error}") from None
            found[str(seed)] = {"loss": ran["final_loss"], "training_s": ran["training_s"]}
            print(f"    validation loss {ran['final_loss']:.4f}, {recipe.steps:,} steps in "
                  f"{ran['training_s']:.1f} s ({ran['total_s']:.1f} s in all)", flush=True)
        return found

    def best(self, recipe: Recipe, min_share: float) -> tuple[Recipe, dict[str, float]]:
        """The recipe at the rate of least loss for the first seed, and all of these losses.

        min_lr is `min_share` of the rate.
        """
        tried = {rate: recipe.at(rate, rate * min_share) for rate in self.rates}
        first = self.seeds[:1]
        losses = {rate: fmean(x["loss"] for x in self.losses(at, first).values())
                  for rate, at in tried.items()}
        rate = min(losses, key=lambda rate: losses[rate])
        if len(losses) > 1 and rate in (min(losses), max(losses)):
            print(f"warning: {rate:g} is the best of --rates, and at their end; give more",
                  flush=True)
        return tried[rate], {f"{rate:g}": loss for rate, loss in losses.items()}


# -- the recipes ---------------------------------------------------------------


def recipe_of(options: Options) -> Recipe:
    """The whole recipe. Raises ValueError for one that is not the modern one."""
    words = tuple(options.config.split())
    if not words:
        raise ValueError(f"--config={options.config}: name a config of ours")
    config = Recipe("", words).config
    for name, value, wanted in (("architecture", config.model.architecture, "nanochat"),
                                ("optimizer", config.optim.optimizer, "muon")):
        if value != wanted:
            raise ValueError(f"--config={options.config}: {name}={value}; the recipe to take apart "
                             f"has {wanted}")
    if options.max_iters:
        warmup = config.optim.warmup_iters * options.max_iters // max(1, config.optim.max_iters)
        words += (f"--max_iters={options.max_iters}", f"--lr_decay_iters={options.max_iters}",
                  f"--warmup_iters={warmup}")
    steps = options.max_iters or config.optim.max_iters
    if steps < 2:
        raise ValueError(f"max_iters={steps}: give 2 or more; the first step is not timed")
    # evaluated by train/evaluate.py when it is done, and as rarely as can be before
    words += ("--device=cpu", f"--dtype={options.dtype}", "--compile=False",
              f"--eval_interval={steps}", "--eval_iters=1", "--log_interval=1",
              "--always_save_checkpoint=True")
    return Recipe("the whole recipe", words)


def plain_of(recipe: Recipe) -> Recipe:
    """GPT-2's recipe for the size, tokens and steps of the modern one."""
    warmup = recipe.steps // 20
    return Recipe("GPT-2's recipe", (*recipe.words, *PLAIN, f"--warmup_iters={warmup}"))


def settings(recipe: Recipe) -> dict[str, Any]:
    """All settings by name."""
    return dict(flatten(recipe.config))


def differs(recipe: Recipe, other: Recipe) -> bool:
    """Whether two recipes are not the same run."""
    return recipe.variant != other.variant or settings(recipe) != settings(other)


# -- measuring -----------------------------------------------------------------


def main(options: Options) -> None:
    """Run everything, print and write what each ingredient brings."""
    seeds, rates = numbers("seeds", options.seeds, int), numbers("rates", options.rates, float)
    if len(seeds) < 2:
        raise ValueError(f"--seeds={options.seeds}: give two or more; one has no spread")
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"--rates={options.rates}: give one or more, each above 0")
    whole = recipe_of(options)
    data = Path(options.data_dir or whole.config.data_dir).resolve()
    open_split(data, "val")  # or says how to prepare it
    name = Path(whole.words[0]).stem
    work = (Path(options.work) if options.work else ROOT / "out-ablation").resolve() / name
    bench = Bench(data, work, seeds, options.each, rates)
    result = {"benchmark": "ablation", "config_file": whole.words[0], "config": settings(whole),
              "seeds": seeds, "without": without(bench, whole),
              "plain": added_to(bench, plain_of(whole)), "environment": environment("cpu")}
    path = result_path(options.out, f"ablation-{name}")
    write_result(path, result)
    print(*told(result), f"written to {path}", sep="\n")


def without(bench: Bench, whole: Recipe) -> dict[str, Any]:
    """The whole recipe, and each ingredient's removal, the dearest first."""
    base, rows = entry(bench, whole, bench.seeds), {}
    for ingredient in REMOVED:
        recipe, more = whole.but(ingredient, f"without {ingredient.name}"), {}
        if not differs(recipe, whole):
            print(f"{whole.words[0]} has no {ingredient.name}: left out", flush=True)
            continue
        if ingredient.rated:
            optim = whole.config.optim
            recipe, more["rates"] = bench.best(recipe, optim.min_lr / optim.learning_rate)
        rows[ingredient.name] = compared(bench, recipe, ingredient, base) | more
    return {"base": base, "rows": by_cost(rows, reverse=True)}


def added_to(bench: Bench, plain: Recipe) -> dict[str, Any]:
    """GPT-2's recipe at the best of the rates, and each addition, the best first."""
    plain, rates = bench.best(plain, 0.1)
    base, rows = entry(bench, plain, bench.seeds) | {"rates": rates}, {}
    for ingredient in ADDED:
        recipe = plain.but(ingredient, f"{ingredient.name} alone")
        rows[ingredient.name] = compared(bench, recipe, ingredient, base)
    return {"base": base, "rows": by_cost(rows, reverse=False)}


def entry(bench: Bench, recipe: Recipe, seeds: list[int]) -> dict[str, Any]:
    """A recipe's runs; with the spread of their losses."""
    runs = bench.losses(recipe, seeds)
    losses = [found["loss"] for found in runs.values()]
    return recipe.described() | {"runs": runs, "loss": fmean(losses),
                                 "training_s": fmean(x["training_s"] for x in runs.values()),
                                 "spread": max(losses) - min(losses)}


def compared(bench: Bench, recipe: Recipe, ingredient: Ingredient,
             base: dict[str, Any]) -> dict[str, Any]:
    """A recipe's runs, and its loss minus the base's from the same seeds."""
    found = entry(bench, recipe, bench.seeds[:bench.each])
    minus = fmean(ran["loss"] - base["runs"][seed]["loss"] for seed, ran in found["runs"].items())
    return found | {"then": ingredient.then, "minus_base": minus,
                    "within_noise": abs(minus) <= 2 * base["spread"]}


def by_cost(rows: dict[str, Any], reverse: bool) -> dict[str, Any]:
    """The rows by the difference to the base."""
    return dict(sorted(rows.items(), key=lambda row: row[1]["minus_base"], reverse=reverse))


def told(result: dict[str, Any]) -> list[str]:
    """The result in lines."""
    lines = []
    for part, what in (("without", "without"), ("plain", "GPT-2's recipe and")):
        base = result[part]["base"]
        lines.append(f"base {base['loss']:.4f}, spread {base['spread']:.4f}: {base['command']}")
        for name, row in result[part]["rows"].items():
            noise = ", within noise" if row["within_noise"] else ""
            then = f" ({row['then']})" if row["then"] else ""
            lines.append(f"{what} {name}{then}: {row['loss']:.4f}, "
                         f"{row['minus_base']:+.4f}{noise}")
    return lines


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
