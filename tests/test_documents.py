"""--document_mask=True, from the text to the loss: equal to each document by itself."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from data.documents import doc_start
from data.gpt2 import END_OF_TEXT
from data.loader import eval_batches
from data.shakespeare import prepare as shakespeare
from data.text import prepare as text
from gpt import GPT
from gpt.config import ARCHITECTURES
from kernels import FAMILIES, Choice
from tests import ranks
from tests.conftest import TINY, every_architecture
from tests.numerics import stirred
from train import build, compiling, documents, evaluate, loop, memory, run
from train.command_line import parse
from train.parallel import World

POSITIONS = "transformer.wpe.weight"


def pieces(ids: list[int], end: int, backward: bool) -> list[tuple[int, int]]:
    """Where the documents of a window begin and end, by the text as one reads it."""
    read = ids[::-1] if backward else ids
    number = [read[:t].count(end) for t in range(len(read))]
    number = number[::-1] if backward else number
    return [(number.index(n), number.index(n) + number.count(n)) for n in dict.fromkeys(number)]


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3),
       st.booleans())
def test_documents_begin_where_the_text_says(windows, backward):
    """Empty ones, ones cut at either end of the window, none, and all the others."""
    found = doc_start(torch.tensor(windows), 3, backward)
    assert found.dtype == torch.int32
    for ids, starts in zip(windows, found.tolist(), strict=True):
        assert starts == [a for a, b in pieces(ids, 3, backward) for _ in range(a, b)]


def test_an_end_of_text_belongs_to_the_document_it_ends():
    ids = torch.tensor([[5, 6, 9, 7, 9, 9, 8]])
    assert doc_start(ids, 9).tolist() == [[0, 0, 0, 3, 3, 5, 6]]
    assert doc_start(ids.flip(1), 9, backward=True).tolist() == [[0, 1, 2, 2, 4, 4, 4]]


def test_the_host_does_not_wait_for_the_device():
    """Tensors without data have nothing to wait for. Compiled, it is one graph."""
    with FakeTensorMode():
        assert doc_start(torch.empty(2, 7, dtype=torch.int64, device="cuda"), 9).is_cuda
    ids = torch.randint(3, (4, 50))
    compiled = torch.compile(doc_start, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids, 2), doc_start(ids, 2))


# -- from the command line -----------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty documents of 1 to 12 words, prepared: several in each window of 32 tokens."""
    folder, chosen = tmp_path_factory.mktemp("documents"), random.Random(0)
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    lines = [json.dumps({"text": " ".join(chosen.choices(words, k=chosen.randint(1, 12)))})
             for _ in range(60)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    text.main(str(folder / "in.jsonl"), folder / "data", val_fraction=0.4, workers=1)
    return folder / "data"


@pytest.fixture
def flags(data, tmp_path, architecture):
    return flags_of(data, tmp_path / "out", f"--architecture={architecture}")


def flags_of(data: Path, out_dir: Path, *more: str) -> list[str]:
    """A run of windows of 32 tokens with the mask, without dropout."""
    own = ("--block_size", "--dropout")
    return [*(f for f in TINY if not f.startswith(own)), "--block_size=32", "--dropout=0",
            f"--data_dir={data}", f"--out_dir={out_dir}", "--document_mask=True", *more]


def metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def separate(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses with each document given to the model by itself, at its positions.

    Learned ones are moved there. Rotations tell only how far two positions are apart.
    """
    total, learned = torch.zeros(()), dict(model.named_parameters()).get(POSITIONS)
    for ids, wanted in zip(idx, targets, strict=True):
        for a, b in pieces(ids.tolist(), END_OF_TEXT, model.config.direction == "backward"):
            moved = {} if learned is None else {POSITIONS: learned.roll(-a, 0)}
            total = total + functional_call(model, moved, (ids[None, a:b], wanted[None, a:b]),
                                            {"reduction": "sum"})
    return total


@every_architecture
def test_a_runs_losses_are_those_of_separate_documents(flags, tmp_path):
    """A finished run's printed losses, against its checkpoint and each document by itself.

    With the mask off it is another run, and the same checkpoint has another loss.
    """
    assert run.main(flags) == 0
    model, losses = GPT.from_checkpoint(str(tmp_path / "out")), torch.zeros(3)
    config = build.build(parse([*flags, "--init_from=resume"])).config
    assert config.data.document_mask
    tokens = build.open_split(config.data_dir, "val")
    with torch.no_grad():
        for idx, targets in eval_batches(tokens, block_size=32, batch_size=config.data.batch_size,
                                         count=config.run.eval_iters, seed=config.run.seed):
            assert len(pieces(idx[0].tolist(), END_OF_TEXT, False)) > 2
            packed = model(idx, targets, reduction="sum")
            losses += torch.stack([separate(model, idx, targets), packed,
                                   torch.tensor(idx.numel())])
    apart, together = (losses[:2] / losses[2]).tolist()
    said = [e["val/loss"] for e in metrics(tmp_path / "out") if "val/loss" in e][-1]
    assert said == pytest.approx(apart, rel=1e-5) and abs(said - together) > 2e-4
    off = [*flags, f"--out_dir={tmp_path / 'off'}", "--document_mask=False"]
    assert run.main(off) == 0
    assert metrics(tmp_path / "off")[-1]["val/loss"] != said


def gradients_of(model: GPT) -> Tensor:
    """All gradients in one row, which the model then has no longer."""
    row = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return row


@every_architecture
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("more", [(), ("--kernels=reference", "--activation_checkpointing=True"),
                                  ("--dtype=bfloat16",)], ids=["torch", "reference", "bf16"])
def test_gradients_are_those_of_separate_documents(direction, more, flags):
    built = build.build(parse([*flags, f"--direction={direction}", *more]))
    stirred(built.model)
    batches = [next(built.batches) for _ in range(2)]

    def of_losses(loss: Tensor) -> tuple[Tensor, Tensor]:
        loss.backward()
        return loss.detach(), gradients_of(built.model)

    alone, wanted = of_losses(sum(separate(built.model, *batch) for batch in batches)
                              / built.config.tokens_per_iter)
    _, packed = of_losses(sum(built.model(*batch, reduction="sum") for batch in batches)
                          / built.config.tokens_per_iter)
    built.batches.position = 0
    loss, found = loop.accumulate(built), gradients_of(built.model)
    rounding = 3e-2 if "--dtype=bfloat16" in more else 1e-4
    assert loss.item() == pytest.approx(alone.item(), rel=rounding)
    assert (found - wanted).norm() < rounding * wanted.norm()
    assert (packed - wanted).norm() > 3 * rounding * wanted.norm()


@every_architecture
@pytest.mark.parametrize("kernels", ["torch", "reference", "triton"])
def test_another_document_changes_no_logit(kernels, flags):
    """By value, bit for bit, and by gradient; without the mask both see it."""
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    built = build.build(parse([*flags, f"--kernels={kernels}", "--n_embd=32"]))
    stirred(built.model)
    idx = next(built.batches)[0][:1]
    (_, end), (a, b), *_ = pieces(idx[0].tolist(), END_OF_TEXT, False)
    other = idx.clone()
    other[0, : end - 1] = (other[0, : end - 1] + 1) % 50000
    streams: list[Tensor] = []  # that the first block reads
    built.model.transformer.h[0].register_forward_pre_hook(
        lambda _, args: (streams.append(args[0]), args[0].retain_grad())[1])
    seen = {}
    for name, starts in (("masked", built.documents(idx)), ("not", None)):
        x, y = (built.model.features(i, starts)[0, a:b] for i in (idx, other))
        (x @ torch.arange(x.shape[1], dtype=x.dtype)).sum().backward()
        seen[name] = (torch.equal(x, y), bool((streams[-2].grad[0, :a] == 0).all()))
    assert seen == {"masked": (True, True), "not": (False, False)}


@pytest.mark.parametrize(("spread", "architecture"),
                         list(zip(("ddp", "fsdp"), ARCHITECTURES)))
def test_two_ranks_are_one_process(spread, architecture, data, tmp_path):
    """Compiled block by block, recomputed in backward, and with a window as well."""
    short = ["--max_iters=3", "--lr_decay_iters=3", "--window=7", f"--architecture={architecture}"]
    assert run.main(flags_of(data, tmp_path / "one", *short)) == 0
    both = flags_of(data, tmp_path / "two", *short, f"--parallel={spread}", "--compile=True",
                    "--activation_checkpointing=True")
    assert ranks.run(ranks.train_each, ([(both, {})],), 2, tmp_path / "logs") == [0, 0]
    one, two = ([(e["iter"], e.get("loss", e.get("val/loss"))) for e in metrics(tmp_path / name)]
                for name in ("one", "two"))
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [x for _, x in two] == pytest.approx([x for _, x in one], rel=1e-5)


def test_resume_is_bit_equal_and_says_what_changed(flags, tmp_path, capsys):
    for limit in (4, 12):
        assert run.main([*flags, f"--out_dir={tmp_path / 'parts'}", f"--max_iters={limit}",
                         "--init_from=auto"]) == 0
    assert run.main(flags) == 0
    steps = [[(e["iter"], e["loss"]) for e in metrics(tmp_path / name) if "loss" in e]
             for name in ("out", "parts")]
    assert steps[0] == steps[1]
    capsys.readouterr()
    assert run.main([*flags, "--init_from=resume", "--max_iters=13",
                     "--document_mask=False"]) == 0
    assert "; document_mask was True, is False" in capsys.readouterr().out


# -- what else must know of it -------------------------------------------------------


@every_architecture
def test_a_whole_split_is_evaluated_as_the_run_was_trained(flags, data, tmp_path, capsys):
    assert run.main(flags) == 0
    asked = {"out_dir": str(tmp_path / "out"), "data_dir": str(data), "device": "cpu",
             "dtype": "float32"}
    said = {mask: evaluate.evaluate(evaluate.Evaluate(**asked, document_mask=mask))["loss"]
            for mask in ("auto", True, False)}
    assert said["auto"] == said[True] and abs(said[True] - said[False]) > 2e-4
    assert capsys.readouterr().out.count("document_mask: True\n") == 2
    model, total = GPT.from_checkpoint(str(tmp_path / "out")), 0.0
    tokens = build.open_split(data, "val")
    ids = torch.from_numpy(tokens.read([0], len(tokens))[0].astype("int64"))
    for start in range(0, len(ids) - 1, 32):
        end = min(start + 32, len(ids) - 1)
        total += separate(model, ids[None, start:end], ids[None, start + 1 : end + 1]).item()
    assert said["auto"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


@every_architecture
def test_what_is_measured_is_what_runs(flags, monkeypatch):
    """The memory of --batch_size=auto, and the block that --compile=auto times."""
    seen: list = []
    monkeypatch.setattr(memory, "check", lambda *_: None)  # which asks for a GPU
    with monkeypatch.context() as patch:
        patch.setattr(memory, "fit", lambda config, *others: (seen.append(others[-1]), config)[1])
        built = build.build(parse([*flags, "--fit_batch=True"]))
    assert seen.pop() is built.documents
    monkeypatch.setattr(memory, "largest", lambda sizes, peak, *_: (peak(2), sizes[0])[1])
    monkeypatch.setattr(memory.hardware, "free_memory_bytes", lambda _: 0)
    forward = built.model.forward
    monkeypatch.setattr(built.model, "forward",
                        lambda *args, **more: (seen.append(more), forward(*args, **more))[1])
    memory.fit(built.config, built.model, World(), built.device, built.dtype, built.documents)
    assert [more["doc_start"].shape for more in seen] == [(1, 32), (2, 32)]
    given = []
    step = compiling.step_of_a_block(built.config, built.model.kernels, torch.float32)
    step(lambda forward: lambda *args: (given.append(args), forward(*args))[1])()
    doc_start = given[0][2].doc_start
    assert (doc_start.shape, doc_start.dtype) == ((4, 32), torch.int32)


def test_without_boundaries_it_is_refused_in_one_line(flags, tiny_flags, tmp_path, capsys):
    """Of characters, and of GPT-2's tokens from a single text without an end."""
    assert run.main([*tiny_flags, "--document_mask=True"]) == 2
    err = capsys.readouterr().err
    assert "tiny is of characters or bytes" in err and err.count("\n") == 1
    (tmp_path / "in.txt").write_text("to be or not to be " * 200)
    shakespeare.main(tmp_path / "in.txt", tmp_path / "whole")
    capsys.readouterr()
    assert run.main([*flags, f"--data_dir={tmp_path / 'whole'}"]) == 2
    err = capsys.readouterr().err
    assert "train.bin holds no end-of-text token (50256)" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_backend_without_documents_is_refused_before_the_first_step(flags):
    config = parse(flags)
    choice = Choice(dict.fromkeys(FAMILIES, "torch") | {"attention": "flash_attn"}, "asked for")
    with pytest.raises(ValueError, match="--attention=flash_attn cannot tell documents apart"):
        documents.documents_of(config, choice, None, build.open_split(config.data_dir, "train"))
