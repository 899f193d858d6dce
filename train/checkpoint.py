"""Checkpoints that survive what happens to machines.

A checkpoint is written beside the training, by a thread on each rank, into a temporary folder;
flushed to disk, marked DONE with the checksum of each file, and only then renamed to its place;
older ones are removed after that. So whatever dies, and whenever, the last whole one stays;
gpt/run_folder.py says which that is. No pickle: tensors are safetensors named after the parameters,
the rest is JSON. Where a rank holds all of the model, rank 0 writes model.safetensors and
optimizer.safetensors; where the ranks hold shards, each writes its own into the folders model/ and
optimizer/ (torch.distributed.checkpoint's layout). Either is read on any number of ranks.
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
    """What a checkpoint holds, as it was at one step: a copy on the host."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """part (model, optimizer, rng) -> name -> all of a tensor, or this rank's shard of it"""
    sharded: bool
    model: GPTConfig
    state: dict[str, Any]
    tokenizer: dict[str, Any]


def finite(model: GPT, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights and moments are finite numbers, on all ranks. All must call it."""
    tensors = [*model.parameters(), *_moments(model, optimizer).values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    device = local[0].device
    bad = sum((~t.detach().isfinite().all()).to(device) for t in local)
    return not parallel.sum_over_ranks(torch.as_tensor(bad, device=device).float()).item()


def copy_to_host(model: GPT, optimizer: torch.optim.Optimizer,
           w: World) -> tuple[dict[str, dict[str, Tensor]], bool]:
    """A Snapshot's tensors, and whether they are shards; if not, ranks other than 0 have none. All
    ranks must call it.

    Random number generators are each rank's own: `RANK:cpu`, `RANK:cuda`.
    """
    parts = {"model": dict(model.named_parameters()), "optimizer": _moments(model, optimizer)}
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if not sharded and w.rank > 0:
        parts = {"model": {}, "optimizer": {}}
    found = {part: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
             for part, tensors in parts.items()}
    rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()}
                                            if torch.cuda.is_available() else {})
    ranks = parallel.gather_or_raise(lambda: rng, w)
    return found | {"rng": {f"{rank}:{kind}": t for rank, states in enumerate(ranks)
                            for kind, t in states.items()}}, sharded


class Writer:
    """Writes checkpoints of a run in a thread beside it, one after the other, together with the
    other ranks' threads."""

    def __init__(self, out_dir: Path, w: World, keep_last: int, keep_every: int,
                 failed: Callable[[], None]):
        """`failed` is called, from the thread, when one could not be written; `wait` then raises
        why."""
        self.out_dir, self.world, self.keep, self.failed = out_dir, w, (keep_last,
                                                                        keep_every), failed
        # its own: the training uses the other meanwhile
        self.group = dist.new_group(backend="gloo") if w.size > 1 else None
        self.thread: threading.Thread | None = None
        self.error: OSError | RuntimeError | None = None

    def begin(self, snapshot: Snapshot) -> None:
        """Start to write, when the one before is done."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint",
                                       daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until what was begun is on disk. Raises OSError, on all ranks, if it could not be
        written."""
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
            self.failed()


def save(out_dir: Path, snapshot: Snapshot, w: World,
         group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint whole, all ranks together, or raise OSError on all of them and leave the
    others as they were."""
    folder = out_dir / f"{TEMPORARY}{snapshot.step}"
    try:
        needed = sum(parallel.gather_or_raise(lambda: _bytes_here(snapshot), w, group))
        parallel.gather_or_raise(lambda: _prepare(out_dir, folder, needed) if w.rank == 0
                          else None, w, group)
        parallel.gather_or_raise(lambda: _write_tensors(folder, snapshot, w, group), w, group)
        sums = parallel.gather_or_raise(lambda: _checksums(folder, snapshot.sharded, w), w, group)
        entries = {name: said for some in sums for name, said in some.items()}
        parallel.gather_or_raise(lambda: _finish(out_dir, folder, snapshot, entries) if w.rank == 0
                          else None, w, group)
    except OSError as error:
        if w.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        kept = complete_checkpoints(out_dir)
        rest = f"the last whole one is {kept[-1]}" if kept else "there is none before it"
        raise OSError(f"checkpoint of step {snapshot.step} in {out_dir} not written: {error}; "
                      f"{rest}") from error


def _bytes_here(snapshot: Snapshot) -> int:
    return sum(
        (t.to_local() if isinstance(t, DTensor) else t).nbytes
        for part in ("model", "optimizer") for t in snapshot.tensors[part].values()
    )


def _prepare(out_dir: Path, folder: Path, needed: int) -> None:
    """An empty folder, where there is room for so many bytes."""
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
        dcp.save(tensors,
                 storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True),
                 process_group=group)
    except dcp.api.CheckpointException as error:  # raised on all ranks; no subclass of Exception
        raise OSError(next(iter(error.failures.values()))[0]) from error


def _checksums(folder: Path, sharded: bool, w: World) -> dict[str, Entry]:
    """Of this rank's share of the files, once they are on disk: name -> bytes, sha256."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    mine = files[w.rank :: w.size] if sharded else files if w.rank == 0 else []
    for file in mine:
        sync(file)
    return {f.relative_to(folder).as_posix(): entry(f) for f in mine}


def _finish(out_dir: Path, folder: Path, snapshot: Snapshot, entries: dict[str, Entry]) -> None:
    """The rest of the folder, DONE, and its name."""
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
    """Let a step that was saved again, now with its validation loss, take the older one's place.

    At every moment there is a whole checkpoint of that step under a name that counts.
    """
    for newer in complete_checkpoints(out_dir):
        place = newer.with_name(newer.name.removesuffix(AGAIN))
        if place == newer:
            continue
        if not place.exists() or remove(place):
            newer.rename(place)
    sync(out_dir)


def prune(out_dir: Path, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints but the last `keep_last`, the best, and multiples of keep_every.

    One that is being read goes the next time. A link stays: whoever made it may remove it.
    """
    folders = complete_checkpoints(out_dir)
    kept = worth_keeping(folders, keep_last)
    kept |= {f for f in folders if keep_every and step_of(f) % keep_every == 0}
    for folder in folders:
        if folder not in kept and not folder.is_symlink():
            remove(folder)


def roll_back(out_dir: Path, step: int) -> Path | None:
    """Move all checkpoints later than `step`, with a copy of the metrics, to a folder of their own.

    The run goes on from `step`, and pruning, which keeps the latest steps, would take them for the
    newest. What is not whole, of any step, goes there too. Returns the folder; None where there was
    nothing to move.
    """
    later = [folder for folder in step_folders(out_dir)
             if step_of(folder) > step or not (folder / DONE).is_file()]
    if not later:
        _make_room(out_dir)  # a kill may have come before
        return None
    aside = free_name(out_dir / "set-aside")
    aside.mkdir()
    if (out_dir / METRICS).exists():
        shutil.copy(out_dir / METRICS, aside)
    for folder in later[::-1]:  # the latest first: after a kill in between the rest still counts
        folder.rename(aside / folder.name)
    _make_room(out_dir)
    return aside


def restore(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, w: World) -> bool:
    """Put back weights, optimizer state and this rank's random number generators, exactly.

    False: the checkpoint is of another number of ranks, and the generators are left for the caller
    to seed. Raises ValueError, before anything is placed, where names or shapes are not this run's.
    """
    parameters, names = dict(model.named_parameters()), optim.numbered(model, optimizer)
    found = {part: saved_shapes(folder, part) for part in ("model", "optimizer")}
    kinds = sorted({key.rpartition(":")[2] for key in found["optimizer"]})
    moments = {
        name: {kind: torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[name])
               for kind in kinds}
        for name in names
    }
    flat = {f"{name}:{kind}": t for name, known in moments.items() for kind, t in known.items()}
    for part, needed in (("model", parameters), ("optimizer", flat)):
        _check_shapes(folder, part, found[part], {k: tuple(t.shape) for k, t in needed.items()})
    read_into(folder, "optimizer", flat)
    with about(folder, "start from its weights alone with --init_from=FOLDER"):
        optim.place(moments, model, optimizer)
    read_into(folder, "model", {name: p.detach() for name, p in parameters.items()})
    rng = load_file(folder / "rng.safetensors")
    if len({key.partition(":")[0] for key in rng}) != w.size:
        return False
    torch.set_rng_state(rng[f"{w.rank}:cpu"])
    if f"{w.rank}:cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng[f"{w.rank}:cuda"])
    return True


def _check_shapes(folder: Path, part: str, found: dict[str, tuple[int, ...]],
                  needed: dict[str, tuple[int, ...]]) -> None:
    if odd := sorted(needed.items() ^ found.items()):
        name = odd[0][0]
        there, here = (shapes.get(name, "none") for shapes in (found, needed))
        raise ValueError(f"{folder}: the shape of {name} is {there} in its {part}, this run's is "
                         f"{here}")


def _moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names, state = optim.numbered(model, optimizer), optimizer.state_dict()["state"]
    return {
        f"{names[i]}:{key}": value
        for i, moments in state.items()
        for key, value in moments.items() if isinstance(value, Tensor)
    }
