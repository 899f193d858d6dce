"""Write, prune and restore checkpoints, so that a kill at any moment leaves a complete one.

A thread on each rank writes a checkpoint beside the training, into a temporary folder. The folder
is flushed to disk, gets DONE with the checksum of each file, and only then its name; after that
older ones are removed. gpt/run_folder.py says which checkpoints are complete, and the newest.

Tensors are safetensors named after the parameters, the rest is JSON; there is no pickle. Where
every rank holds the whole model, rank 0 writes model.safetensors and optimizer.safetensors. Under
FSDP each rank writes its shards into the folders model/ and optimizer/, in the layout of
torch.distributed.checkpoint. Both kinds are read on any number of ranks.
"""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.files import sync
from gpt import GPT, GPTConfig
from gpt.checkpoint_files import (
    DONE,
    Entry,
    config_json,
    entry,
    read_into,
    save_tensors,
    saved_shapes,
)
from gpt.run_folder import (
    AGAIN,
    TEMPORARY,
    complete_checkpoints,
    discard,
    free_name,
    remove,
    step_folders,
    step_of,
    worth_keeping,
)
from gpt.tensors import about
from train import optim, parallel
from train.parallel import World

MARGIN_BYTES = 2**20  # for what is not tensors
METRICS = "metrics.jsonl"


class Snapshot(NamedTuple):
    """What a checkpoint will hold, copied to the host at one step."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """part (model, optimizer, rng) -> name -> the full tensor, or this rank's shard of it"""
    sharded: bool
    model: GPTConfig
    state: dict[str, Any]
    tokenizer: dict[str, Any]


def all_ranks_finite(model: GPT, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights and moments are finite, on all ranks. Every rank must call it."""
    tensors = [*model.parameters(), *_moments(model, optimizer).values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    device = local[0].device
    bad = sum((~t.detach().isfinite().all()).to(device) for t in local)
    return not parallel.sum_over_ranks(torch.as_tensor(bad, device=device).float()).item()


def copy_to_host(model: GPT, optimizer: torch.optim.Optimizer,
                 w: World) -> tuple[dict[str, dict[str, Tensor]], bool]:
    """Copy a Snapshot's tensors; return them, and whether they are shards. Every rank must call it.

    Where they are not, ranks other than 0 copy none. The states of the random number generators are
    gathered from all ranks, as `RANK:cpu` and `RANK:cuda`.
    """
    parts = {"model": dict(model.named_parameters()), "optimizer": _moments(model, optimizer)}
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if not sharded and w.rank > 0:
        parts = {"model": {}, "optimizer": {}}
    copies = {part: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
              for part, tensors in parts.items()}
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    by_rank = enumerate(parallel.gather_or_raise(lambda: rng, w))
    copies["rng"] = {f"{rank}:{kind}": t for rank, states in by_rank for kind, t in states.items()}
    return copies, sharded


class Writer:
    """Writes one checkpoint after the other in a thread; the threads of all ranks work together."""

    def __init__(self, out_dir: Path, w: World, keep_last: int, keep_every: int,
                 on_failure: Callable[[], None]):
        """`on_failure` is called in the thread when a checkpoint could not be written.

        Every rank must call it.
        """
        self.out_dir, self.world, self.on_failure = out_dir, w, on_failure
        self.keep = keep_last, keep_every
        # A process group of its own, since the training uses the default one at the same time.
        self.group = dist.new_group(backend="gloo") if w.size > 1 else None
        self.thread: threading.Thread | None = None
        self.error: OSError | RuntimeError | None = None

    def begin(self, snapshot: Snapshot) -> None:
        """Start to write a checkpoint, after the one before is written."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint",
                                       daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises OSError, on all ranks, if it is not.

        RuntimeError, if another rank is gone.
        """
        if self.thread is not None:
            self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error is not None:
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            save(self.out_dir, snapshot, self.world, self.group)
            if self.world.rank == 0:
                prune(self.out_dir, *self.keep)
        except (OSError, RuntimeError) as error:  # RuntimeError: another rank is gone
            self.error = error
            self.on_failure()


def save(out_dir: Path, snapshot: Snapshot, w: World,
         group: dist.ProcessGroup | None = None) -> None:
    """Write a complete checkpoint, or raise OSError on all ranks and change no other one.

    Every rank must call it.
    """
    folder = out_dir / f"{TEMPORARY}{snapshot.step}"

    def on_rank_0(fn: Callable[[], None]) -> None:
        parallel.gather_or_raise(lambda: fn() if w.rank == 0 else None, w, group)

    try:
        needed = sum(parallel.gather_or_raise(lambda: _bytes_here(snapshot), w, group))
        on_rank_0(lambda: _make_folder(out_dir, folder, needed))
        parallel.gather_or_raise(lambda: _write_tensors(folder, snapshot, w, group), w, group)
        sums = parallel.gather_or_raise(lambda: _checksums(folder, snapshot.sharded, w), w, group)
        entries = {name: entry for of_rank in sums for name, entry in of_rank.items()}
        on_rank_0(lambda: _finish(out_dir, folder, snapshot, entries))
    except OSError as error:
        if w.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        kept = complete_checkpoints(out_dir)
        rest = f"the last complete one is {kept[-1]}" if kept else "there is none before it"
        raise OSError(f"checkpoint of step {snapshot.step} in {out_dir} not written: {error}; "
                      f"{rest}") from error


def _bytes_here(snapshot: Snapshot) -> int:
    """What this rank will write, but for the generators' states."""
    return sum(
        (t.to_local() if isinstance(t, DTensor) else t).nbytes
        for part in ("model", "optimizer") for t in snapshot.tensors[part].values()
    )


def _make_folder(out_dir: Path, folder: Path, needed: int) -> None:
    """Make the folder anew. Raises OSError where `needed` bytes do not fit on the disk."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(f"{TEMPORARY}*"):
        discard(leftover)
    free = shutil.disk_usage(out_dir).free
    if free < needed + MARGIN_BYTES:
        raise OSError(f"{needed / 1e6:,.1f} MB and some are needed, {free / 1e6:,.1f} MB are free")
    folder.mkdir()


def _write_tensors(folder: Path, snapshot: Snapshot, w: World,
                   group: dist.ProcessGroup | None) -> None:
    for part, tensors in snapshot.tensors.items():
        if snapshot.sharded and part != "rng":
            _write_shards(folder / part, tensors, group)
        elif w.rank == 0:
            save_tensors(tensors, folder / f"{part}.safetensors")


def _write_shards(folder: Path, tensors: dict[str, Tensor],
                  group: dist.ProcessGroup | None) -> None:
    import torch.distributed.checkpoint as dcp  # a second to import

    folder.mkdir(exist_ok=True)
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:  # raised on all ranks; no subclass of Exception
        raise OSError(next(iter(error.failures.values()))[0]) from error


def _checksums(folder: Path, sharded: bool, w: World) -> dict[str, Entry]:
    """Flush this rank's share of the files to disk; return what DONE is to say of each."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    mine = files[w.rank :: w.size] if sharded else files if w.rank == 0 else []
    for file in mine:
        sync(file)
    return {f.relative_to(folder).as_posix(): entry(f) for f in mine}


def _finish(out_dir: Path, folder: Path, snapshot: Snapshot, entries: dict[str, Entry]) -> None:
    """Write the JSON files and DONE, then give the folder its name."""
    texts = {"model": config_json(snapshot.model),
             "state": json.dumps(snapshot.state | {"step": snapshot.step}, indent=1),
             "tokenizer": json.dumps(snapshot.tokenizer)}
    for name, text in texts.items():
        file = folder / f"{name}.json"
        file.write_text(text)
        sync(file)
        entries[file.name] = entry(file)
    done, place = folder / DONE, out_dir / f"step-{snapshot.step:08d}"
    done.write_text(json.dumps(entries, indent=1))
    for path in (done, *(f for f in folder.iterdir() if f.is_dir()), folder):
        sync(path)
    if place.exists():
        place = place.with_name(place.name + AGAIN)
    folder.rename(place)
    sync(out_dir)
    _make_room(out_dir)


def _make_room(out_dir: Path) -> None:
    """Replace a step's checkpoint by one that was saved again, with its validation loss.

    At every moment a complete checkpoint of that step stands under a name that counts.
    """
    for newer in complete_checkpoints(out_dir):
        place = newer.with_name(newer.name.removesuffix(AGAIN))
        if place == newer:
            continue
        if not place.exists() or remove(place):
            newer.rename(place)
    sync(out_dir)


def prune(out_dir: Path, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints, except the last `keep_last`, the best, and multiples of `keep_every`.

    One that is being read is removed the next time. A symbolic link is never removed.
    """
    folders = complete_checkpoints(out_dir)
    kept = worth_keeping(folders, keep_last)
    kept |= {f for f in folders if keep_every and step_of(f) % keep_every == 0}
    for folder in folders:
        if folder not in kept and not folder.is_symlink():
            remove(folder)


def roll_back(out_dir: Path, step: int) -> Path | None:
    """Move checkpoints later than `step`, and a copy of the metrics, to a new folder; return it.

    The run goes on from `step`: were they left, pruning would keep them instead of newer ones.
    Incomplete checkpoints are moved too, of any step. None where there is nothing to move.
    """
    later = [folder for folder in step_folders(out_dir)
             if step_of(folder) > step or not (folder / DONE).is_file()]
    if not later:
        _make_room(out_dir)  # a kill may have come before it
        return None
    aside = free_name(out_dir / "set-aside")
    aside.mkdir()
    if (out_dir / METRICS).exists():
        shutil.copy(out_dir / METRICS, aside)
    for folder in later[::-1]:  # the latest first, so that a kill in between leaves no gap
        folder.rename(aside / folder.name)
    _make_room(out_dir)
    return aside


def restore(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, w: World) -> bool:
    """Restore weights, optimizer state and this rank's random number generators, bit for bit.

    Return False where another number of ranks saved the checkpoint: the caller must then seed the
    generators. Raises ValueError, before anything is changed, where names or shapes differ.
    """
    parameters = dict(model.named_parameters())
    saved = {part: saved_shapes(folder, part) for part in ("model", "optimizer")}
    moments = {
        name: {kind: torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[name])
               for kind in kinds}
        for name, kinds in optim.state_keys(model, optimizer).items()
    }
    flat = {f"{name}:{kind}": t for name, state in moments.items() for kind, t in state.items()}
    for part, needed in (("model", parameters), ("optimizer", flat)):
        _check_shapes(folder, part, saved[part], {k: tuple(t.shape) for k, t in needed.items()})
    read_into(folder, "optimizer", flat)
    with about(folder, "start from its weights alone with --init_from=FOLDER"):
        optim.load_moments(moments, model, optimizer)
    read_into(folder, "model", {name: p.detach() for name, p in parameters.items()})
    rng = load_file(folder / "rng.safetensors")
    if len({key.partition(":")[0] for key in rng}) != w.size:
        return False
    torch.set_rng_state(rng[f"{w.rank}:cpu"])
    if f"{w.rank}:cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng[f"{w.rank}:cuda"])
    return True


def _check_shapes(folder: Path, part: str, saved: dict[str, tuple[int, ...]],
                  needed: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    if differing := sorted(needed.items() ^ saved.items()):
        name = differing[0][0]
        there, here = (shapes.get(name, "none") for shapes in (saved, needed))
        raise ValueError(f"{folder}: the shape of {name} is {there} in its {part}, this run's is "
                         f"{here}")


def _moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `PARAMETER:KEY` -> tensor."""
    names, state = optim.parameter_names(model, optimizer), optimizer.state_dict()["state"]
    return {
        f"{names[i]}:{key}": value
        for i, moments in state.items()
        for key, value in moments.items() if isinstance(value, Tensor)
    }
