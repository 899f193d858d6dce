"""The loader: each window once per epoch, in an order of seed and position for any world size."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data import loader as loader_module
from data.loader import Loader, eval_batches, permute, window_starts, windows_per_epoch
from data.tokens import open_tokens, write_tokens

BLOCK = 7


def opened(tmp_path, n):
    # An id is its own index, so a window's first id says where the window begins.
    write_tokens(tmp_path / "train.bin", np.arange(n))
    return open_tokens(tmp_path / "train.bin")


@pytest.fixture
def tokens(tmp_path):
    return opened(tmp_path, 1000)


def starts(batches, n):
    return torch.cat([next(batches)[0][:, 0] for _ in range(n)]).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 99_991])
def test_permute_permutes(n):
    keys = np.full(n, 12345, np.uint64)
    assert np.array_equal(np.sort(permute(np.arange(n, dtype=np.uint64), n, keys)), np.arange(n))


def test_the_shuffle_is_fair():
    """Over 20,000 keys all places of a permutation of 6, and all pairs, come equally often."""
    keys = np.arange(20_000, dtype=np.uint64)
    first, second = (permute(np.full(len(keys), i, np.uint64), 6, keys) for i in (0, 1))
    for values, cells in ((first, 6), (first * np.uint64(6) + second, 30)):
        counts = np.array(list(Counter(values.tolist()).values()))
        expected = len(keys) / cells
        assert len(counts) == cells and np.abs(counts - expected).max() < 5 * expected**0.5


def test_an_epoch_is_shuffled():
    keys = np.zeros(10_000, np.uint64)
    order = permute(np.arange(10_000, dtype=np.uint64), 10_000, keys).astype(int)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000 / 3, rel=0.05)


def test_targets_are_the_next_tokens(tokens):
    inputs, targets = next(Loader(tokens, block_size=BLOCK, batch_size=3, seed=1))
    assert inputs.shape == targets.shape == (3, BLOCK)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(BLOCK))
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("n", [8, 9, 14, 15, 21, 22, 1000])
def test_each_window_comes_exactly_once_per_epoch(tmp_path, n):
    tokens = opened(tmp_path, n)
    per_epoch = windows_per_epoch(n, BLOCK)
    loader = Loader(tokens, block_size=BLOCK, batch_size=1, seed=3)
    for _ in range(4):
        seen = sorted(starts(loader, per_epoch))
        assert len(set(seen)) == per_epoch
        assert np.all(np.diff(seen) == BLOCK)
    assert loader.epoch == 4


def test_epochs_differ_in_order_and_in_where_windows_begin(tokens):
    loader = Loader(tokens, block_size=BLOCK, batch_size=1, seed=3)
    epochs = [starts(loader, windows_per_epoch(1000, BLOCK)) for _ in range(30)]
    assert {epoch[0] % BLOCK for epoch in epochs} == set(range(BLOCK))
    assert len({tuple(np.array(epoch) // BLOCK) for epoch in epochs}) == 30


def test_ranks_are_disjoint_and_make_the_same_global_batches(tokens):
    """A step of 4 micro-batches has the same windows on 1, 2 and 4 ranks, at an epoch's end too."""
    def step_windows(world_size):
        options = {"block_size": BLOCK, "batch_size": 3, "seed": 5, "world_size": world_size}
        ranks = [Loader(tokens, rank=rank, **options) for rank in range(world_size)]
        for _ in range(30):
            yield sorted(start for rank in ranks for start in starts(rank, 4 // world_size))
        assert {rank.position for rank in ranks} == {30 * 12}

    one, two, four = (list(step_windows(world_size)) for world_size in (1, 2, 4))
    assert one == two == four
    per_epoch = windows_per_epoch(1000, BLOCK)
    first_epoch = [start for step in one[: per_epoch // 12] for start in step]
    assert len(set(first_epoch)) == len(first_epoch) == 132


class PrefetcherOnTheHost:
    """What `_Prefetcher` does, without a GPU."""

    def __init__(self, device, shape, read):
        self.batch, self.read = torch.empty(shape, dtype=torch.int64), read

    def start(self, position):
        self.batch = torch.empty_like(self.batch)
        self.read(position, self.batch)

    def take(self):
        return self.batch


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_position_that_is_set_counts_at_once(tokens, device, monkeypatch):
    """A batch that a GPU has already prefetched must not be used once the position is set."""
    monkeypatch.setattr(loader_module, "_Prefetcher", PrefetcherOnTheHost)
    options = {"block_size": BLOCK, "batch_size": 3, "seed": 9, "device": device}
    fresh, resumed = Loader(tokens, position=30, **options), Loader(tokens, **options)
    for _ in range(2):
        resumed.position = fresh.position
        for _ in range(3):
            assert all(map(torch.equal, next(fresh), next(resumed)))
            assert fresh.position == resumed.position
        next(fresh)
    assert fresh.position == 30 + 8 * 3


@pytest.mark.parametrize("after", [1, 50, 200])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_equals_going_on(tokens, after, world_size):
    options = {"block_size": BLOCK, "batch_size": 3, "seed": 9, "rank": world_size - 1,
               "world_size": world_size}
    loader = Loader(tokens, **options)
    starts(loader, after)
    assert loader.position == after * 3 * world_size
    again = Loader(tokens, position=loader.position, **options)
    for _ in range(60):
        assert all(map(torch.equal, next(loader), next(again)))


def test_the_seed_decides(tokens):
    def order(seed):
        return starts(Loader(tokens, block_size=BLOCK, batch_size=10, seed=seed), 10)

    assert order(1) == order(1) != order(2)


def test_the_order_never_changes():
    """A checkpoint's position means the same windows in every version of this program."""
    assert window_starts(np.arange(139, 143), 1000, BLOCK, 1337).tolist() == [107, 79, 213, 353]


def test_torch_and_numpy_random_state_are_not_touched(tokens):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    next(Loader(tokens, block_size=BLOCK, batch_size=2, seed=0))
    list(eval_batches(tokens, block_size=BLOCK, batch_size=2, count=3, seed=0))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == np.random.get_state()[1].tolist()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(),
                    reason="resident memory is read from Linux's /proc")
def test_memory_stays_flat_over_10_000_batches(tmp_path):
    """With a memory map the pages that were read, up to 32 MB, would count as this process's."""
    write_tokens(tmp_path / "train.bin", np.zeros(1 << 24, np.uint16))
    loader = Loader(open_tokens(tmp_path / "train.bin"), block_size=1023, batch_size=2, seed=0)
    next(loader)
    before = resident_bytes()
    for _ in range(10_000):
        next(loader)
    assert resident_bytes() - before < 4 << 20


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("wrong", [{"block_size": 1000}, {"batch_size": 0}, {"position": -1}])
def test_wrong_sizes_are_refused(tokens, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Loader(tokens, **({"block_size": BLOCK, "batch_size": 2, "seed": 0} | wrong))


# -- evaluation ----------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_the_same_windows_on_any_number_of_ranks(tokens, world_size):
    options = {"block_size": BLOCK, "batch_size": 3, "count": 5, "seed": 2}
    ranks = [list(eval_batches(tokens, rank=r, world_size=world_size, **options))
             for r in range(world_size)]
    # With different numbers, ranks under FSDP would wait for one another forever.
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for inputs, targets in (batch for batches in ranks for batch in batches):
        counted = targets[:, 0] >= 0
        assert torch.equal(targets, torch.where(counted[:, None], inputs + 1, -1))
        seen += inputs[counted, 0].tolist()
    alone = [inputs[:, 0] for inputs, _ in eval_batches(tokens, **options)]
    assert sorted(seen) == sorted(torch.cat(alone).tolist()) and len(set(seen)) == 15


def test_evaluation_ends_with_the_data(tokens, tmp_path):
    batches = list(eval_batches(tokens, block_size=BLOCK, batch_size=10, count=200, seed=2))
    assert [len(inputs) for inputs, _ in batches] == [10] * 14
    assert len(set(torch.cat([inputs[:, 0] for inputs, _ in batches]).tolist())) == 140
    tiny = eval_batches(opened(tmp_path, 24), block_size=BLOCK, batch_size=10, count=9, seed=2)
    assert [len(inputs) for inputs, _ in tiny] == [2]


def test_evaluation_of_the_training_text_is_not_the_first_training_batch(tokens):
    options = {"block_size": BLOCK, "batch_size": 10, "seed": 2}
    trained = starts(Loader(tokens, **options), 1)
    evaluated = starts(eval_batches(tokens, count=1, **options), 1)
    assert sorted(trained) != sorted(evaluated)


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_those_on_the_cpu(tokens):
    options = {"block_size": BLOCK, "batch_size": 3, "seed": 9}
    on_gpu, on_cpu = Loader(tokens, device="cuda", **options), Loader(tokens, **options)
    for i in range(50):
        if i == 25:
            on_gpu.position = on_cpu.position = 6
        kept = next(on_gpu)
        # The GPU lags behind, and the host must not overwrite what is still to be copied.
        torch.cuda._sleep(100_000)
        assert on_gpu.position == on_cpu.position + 3
        assert all(torch.equal(a.cpu(), b) for a, b in zip(kept, next(on_cpu)))
    assert kept[0].device.type == "cuda" and kept[0].is_contiguous()
