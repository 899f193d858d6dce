"""Who needs less for a validation loss: steps, tokens and seconds of ours and of a rival.

    python bench/race.py --nanogpt=../nanoGPT                        # nanoGPT's macbook command
    python bench/race.py --nanogpt=../nanoGPT --rates=0.002,0.004    # and at further peak rates
    python bench/race.py --case=quickstart       # configs/quickstart.py and the recipe of 2019
    python bench/race.py --nanogpt=../nanoGPT --smoke=True           # 20 steps, to try the command

Contestants take turns on one machine, seed by seed (A B A B), never two at once. Give ours of
several lengths, each with its own decay of the rate:
`--ours="configs/macbook.py --max_iters=250 --lr_decay_iters=250; configs/macbook.py"`.

- The final loss is that of the last checkpoint on the whole validation split, in fp32, by
  train/evaluate.py for all; of several seeds the mean. It depends on block_size, the context.
- A rival's final loss is the target. Ours reaches it if its own final loss is not above; the
  shortest of ours that does is compared, whole run with whole run.
- Seconds of training are those of all steps, without evaluations and saves. Steps that follow an
  evaluation, the first one among them, count with the median of the others, for all alike.
- Seconds in all are those of the process: imports, compiling with nothing compiled before, every
  evaluation and save. All evaluate equally often (--evaluations) and on as many tokens, and save
  each time.
- The curves are from those evaluations, each on random windows of the split, and noisier than the
  final losses: they are for the picture.

A finished run is kept in --work, and taken again if its command, code, data and machine are the
same. Exit code: 0; 2 for bad input, or if a run fails.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.curves.contestants import CONFIG, Contestant, run
from bench.curves.race_picture import draw
from bench.options import named
from bench.timing import ROOT, environment, result_path, write_result
from common import cli, hardware
from common.bounds import Positive
from data.tokens import open_split


@dataclass(frozen=True)
class Options:
    """Race our trainer against another one, or against itself."""

    case: str = "macbook"
    """macbook: against nanoGPT's command of that name; quickstart: configs/quickstart.py against
    configs/quickstart_gpt2.py"""
    nanogpt: str = ""
    """a checkout of nanoGPT"""
    rates: str = ""
    """further peak learning rates for nanoGPT, with commas; min_lr is a tenth"""
    ours: str = ""
    """config and flags, as train/run.py takes them; several with semicolons; empty: the case's"""
    data_dir: str = ""
    """folder of tokens; empty: that of the case in data/"""
    seeds: str = "1337,1338"
    """two or more, with commas"""
    evaluations: Positive = 20
    """of each run, about; the interval divides its steps"""
    device: str = "cpu"
    smoke: bool = False
    """20 steps, 2 evaluations, nothing into bench/results"""
    work: str = ""
    """folder of the runs; empty: out-race"""
    out: str = ""
    """JSON file for the result, the picture beside it; empty: bench/results/race-CASE.json"""


@dataclass(frozen=True)
class Case:
    """A race: what is trained on, and by whom."""

    dataset: str
    ours: str
    rival: tuple[str, ...]
    """config and flags; nanoGPT's where the config is CONFIG"""
    eval_tokens: int
    """of an evaluation, of each split"""


CASES = {
    "macbook": Case(
        "shakespeare_char", "configs/macbook.py",
        (CONFIG, "--compile=False", "--block_size=64", "--batch_size=12", "--n_layer=4",
         "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000",
         "--dropout=0.0"), 20 * 12 * 64),
    "quickstart": Case("python_stdlib", "configs/quickstart.py", ("configs/quickstart_gpt2.py",),
                       20 * 16 * 64),
}
SMOKE = ("--max_iters=20", "--lr_decay_iters=20", "--warmup_iters=5")


# -- who takes part ------------------------------------------------------------


def rivals_of(case: Case, options: Options) -> list[Contestant]:
    """The case's rival; nanoGPT at each of --rates, too. Raises ValueError without a checkout."""
    if case.rival[0] != CONFIG:
        if options.nanogpt or options.rates:
            raise ValueError(f"--case={options.case} has no nanoGPT in it; leave --nanogpt and "
                             "--rates out")
        return [entered(Contestant(case.rival[0], case.rival), case, options)]
    folder = Path(options.nanogpt).resolve()
    if not options.nanogpt or not (folder / "train.py").is_file():
        raise ValueError(f"--nanogpt={options.nanogpt}: no train.py there; clone nanoGPT "
                         "(github.com/karpathy/nanoGPT) and name its folder")
    found = [Contestant("nanoGPT", case.rival, folder)]
    for rate in numbers("rates", options.rates, float):
        flags = (f"--learning_rate={rate!r}", f"--min_lr={rate / 10!r}")
        found.append(Contestant(f"nanoGPT, rate {rate:g}", (*case.rival, *flags), folder))
    return [entered(contestant, case, options) for contestant in found]


def ours_of(case: Case, options: Options) -> list[Contestant]:
    """Ours, the shortest run first; with several the steps are in the name."""
    given = [part.split() for part in (options.ours or case.ours).split(";") if part.split()]
    if not given:
        raise ValueError(f"--ours= is empty; name a config of ours to race in "
                         f"--case={options.case}")
    found = [entered(Contestant("ours", tuple(words)), case, options) for words in given]
    if len(found) == 1:
        return found
    found = [Contestant(f"ours, {c.steps:,} steps", c.words) for c in sorted(found, key=tokens_of)]
    if len({c.name for c in found}) < len(found):
        raise ValueError(f"--ours={options.ours}: two of the same number of steps")
    return found


def entered(contestant: Contestant, case: Case, options: Options) -> Contestant:
    """The contestant with the flags that all have: where it runs, when it evaluates and saves."""
    words = (*contestant.words, f"--device={options.device}", *(SMOKE if options.smoke else ()))
    config = Contestant(contestant.name, words, contestant.nanogpt).config
    steps, count = config.optim.max_iters, 2 if options.smoke else options.evaluations
    most = max(1, steps // count)
    # nanoGPT evaluates after its last step only if the interval divides its steps
    interval = next(n for n in range(most, 0, -1) if steps % n == 0)
    batches = round(case.eval_tokens / (config.data.batch_size * config.model.block_size))
    words += (f"--eval_interval={interval}", f"--eval_iters={max(1, batches)}", "--log_interval=1",
              "--always_save_checkpoint=True")
    return Contestant(contestant.name, words, contestant.nanogpt)


def numbers(flag: str, given: str, kind: type) -> list[Any]:
    """The numbers in `given`, split at commas, without repeats. Raises ValueError for others."""
    try:
        found = [kind(word) for word in given.split(",") if word.strip()]
    except ValueError:
        raise ValueError(f"--{flag}={given}: numbers with commas are needed") from None
    if len(set(found)) < len(found) or any(not value >= 0 for value in found):
        raise ValueError(f"--{flag}={given}: each must be at least 0, and given once")
    return found


def tokens_of(contestant: Contestant) -> int:
    """Tokens that the whole run trains on."""
    return contestant.steps * contestant.config.tokens_per_iter


# -- the race ------------------------------------------------------------------


def main(options: Options) -> None:
    """Run all contestants from all seeds in turns, print and write who needs how much."""
    case = CASES[named("case", options.case, CASES)[0]]
    options = replace(options, device=str(hardware.resolve_device(options.device)))
    seeds = numbers("seeds", options.seeds, int)
    if len(seeds) < 2:
        raise ValueError(f"--seeds={options.seeds}: give two or more; one run may be luck")
    data = Path(options.data_dir or ROOT / "data" / case.dataset).resolve()
    open_split(data, "val")  # or says how to prepare it
    rivals, ours = rivals_of(case, options), ours_of(case, options)
    work = (Path(options.work) if options.work else ROOT / "out-race").resolve() / options.case
    out = options.out or (str(work / "smoke.json") if options.smoke else "")
    runs = in_turns([*rivals, *ours], seeds, data, work)
    result: dict[str, Any] = {
        "benchmark": "race", "case": options.case, "environment": environment(options.device),
        "evaluated_tokens": case.eval_tokens, "rivals": [c.name for c in rivals],
        "ours": [c.name for c in ours],
        "contestants": {c.name: c.described() | {"runs": runs[c.name]} for c in [*rivals, *ours]},
    }
    result["verdicts"] = {c.name: verdict(result, c.name) for c in rivals}
    path = result_path(out, f"race-{options.case}")
    write_result(path, result)
    draw(path.with_suffix(".png"), result)
    print(*[said(name, found) for name, found in result["verdicts"].items()], *disturbed(result),
          sep="\n")
    print(f"written to {path} and {path.with_suffix('.png').name}")


def in_turns(contestants: list[Contestant], seeds: list[int], data: Path,
             work: Path) -> dict[str, dict[str, Any]]:
    """Each contestant's run from each seed: all from the first one, then from the next one."""
    runs: dict[str, dict[str, Any]] = {c.name: {} for c in contestants}
    turns = [(seed, contestant) for seed in seeds for contestant in contestants]
    for i, (seed, contestant) in enumerate(turns, 1):
        print(f"{i} of {len(turns)}: {contestant.name}, seed {seed}", flush=True)
        try:
            found = run(contestant, seed, data, work)
        except ValueError as error:
            raise ValueError(f"{contestant.name}, seed {seed}: {error}") from None
        ms = found["step_ms"]
        print(f"    {contestant.steps:,} steps in {found['training_s']:.1f} s "
              f"({found['total_s']:.1f} s in all), {ms['median']:.1f} ms a step (quartiles "
              f"{ms['q1']:.1f} to {ms['q3']:.1f}), validation loss {found['final_loss']:.4f}",
              flush=True)
        runs[contestant.name][str(seed)] = {k: v for k, v in found.items() if k != "identity"}
    return runs


def mean(contestant: dict[str, Any], key: str) -> float:
    """The mean over a contestant's seeds."""
    return fmean(found[key] for found in contestant["runs"].values())


def verdict(result: dict[str, Any], rival: str) -> dict[str, Any]:
    """The rival's mean final loss, the shortest of ours that reaches it, and what it needs.

    Each need is the rival's over ours: 8.0 says that ours needs an eighth.
    """
    theirs = result["contestants"][rival]
    target = mean(theirs, "final_loss")
    for name in result["ours"]:
        ours = result["contestants"][name]
        if mean(ours, "final_loss") <= target:
            steps = theirs["steps"] / ours["steps"]
            return {"target": target, "reached_by": name, "steps": steps,
                    "tokens": steps * theirs["tokens_per_step"] / ours["tokens_per_step"],
                    **{key: mean(theirs, key) / mean(ours, key)
                       for key in ("training_s", "total_s")}}
    return {"target": target, "reached_by": None}


def said(rival: str, found: dict[str, Any]) -> str:
    """A verdict in words."""
    told = f"to {found['target']:.4f}, where {rival} ends: "
    if not found["reached_by"]:
        return told + "not reached by ours"
    return told + (f"{found['reached_by']} takes 1/{found['steps']:.2f} of its steps, "
                   f"1/{found['tokens']:.2f} of its tokens, 1/{found['training_s']:.2f} of its "
                   f"seconds of training and 1/{found['total_s']:.2f} of those in all")


def disturbed(result: dict[str, Any]) -> list[str]:
    """A warning for each contestant that took longer from one seed: something else was running.

    The limit is 15 %: the quartiles of macbook steps in mfu-cpu*.json are within 10 %.
    """
    found = []
    for name, contestant in result["contestants"].items():
        seconds = {seed: run["training_s"] for seed, run in contestant["runs"].items()}
        slow, least = max(seconds, key=lambda seed: seconds[seed]), min(seconds.values())
        if seconds[slow] > 1.15 * least:
            found.append(f"warning: {name} trained {seconds[slow]:.1f} s from seed {slow} and "
                         f"{least:.1f} s from another one; remove that run from --work and give "
                         "the command again with nothing else running")
    return found


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
