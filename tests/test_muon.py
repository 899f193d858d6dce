"""Muon: its step, what it skips, and the work that ranks share. On the CPU."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gpt import GPT, GPTConfig
from gpt.config import make_config
from tests import ranks
from train import optim
from train.config import Config, OptimConfig
from train.muon import Muon, by_shares, orthogonal, process_groups, shard_sizes
from train.parallel import full_tensor, shard_like

SHAPES = [(24, 16), (16, 40), (20, 20)]
MUON = OptimConfig(optimizer="muon", weight_decay=0.1, warmup_iters=0)
TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, bias=True)


def matrices(shape, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(n)]


def with_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def one_group(params, **more):
    return {"params": params, "packed": 1, "lr": 0.02, "weight_decay": 0.1, **more}


# -- the step ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 128), (1, 8), (8, 1)], ids=str)
def test_the_update_is_nearly_the_orthogonal_factor_of_an_svd(shape, dtype):
    """U S' V^T with the same U and V, and S' in the band that Jordan gives, 0.7 to 1.2.

    Singular values near 0 have not arrived there in five steps: these matrices have none.
    """
    u, _, vh = torch.linalg.svd(torch.randn(5, *shape), full_matrices=False)
    s = torch.rand(5, min(shape)) * 0.8 + 0.2
    found = orthogonal(((u * s[:, None]) @ vh).to(dtype)).float()
    between = u.mT @ found @ vh.mT
    values = torch.diagonal(between, dim1=1, dim2=2)
    assert 0.65 < values.min() and values.max() < 1.25
    off = between - torch.diag_embed(values)
    assert off.abs().max() < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_matrix_of_zeros_stays_and_scale_does_not_matter():
    assert orthogonal(torch.zeros(2, 4, 6)).eq(0).all()
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(orthogonal(1e-3 * x), orthogonal(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_those_of_pytorchs_muon(shape, monkeypatch):
    """Its products are bf16 in any case; here they are fp32 in both, so that nothing is rounded."""
    ours = matrices(shape)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Muon([one_group(ours)], torch.float32)
    yardstick = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    for step in range(4):
        for params in (ours, theirs):
            with_gradients(params, step)
        optimizer.step()
        yardstick.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_packed_matrix_is_several():
    packed, parts = matrices((24, 8), n=1), matrices((24, 8), n=1)[0].detach().chunk(3)
    parts = [nn.Parameter(part.clone()) for part in parts]
    with_gradients(packed, 1)
    for part, grad in zip(parts, packed[0].grad.chunk(3), strict=True):
        part.grad = grad.clone()
    Muon([one_group(packed, packed=3)], torch.float32).step()
    Muon([one_group(parts)], torch.float32).step()
    torch.testing.assert_close(packed[0], torch.cat(parts), rtol=0, atol=1e-6)


def test_the_other_parameters_are_adamws():
    ours, theirs = matrices((6, 5)), matrices((6, 5))
    optimizer = Muon([{"params": ours, "lr": 0.01, "weight_decay": 0.1}], torch.float32)
    yardstick = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(3):
        for params in (ours, theirs):
            with_gradients(params, step)
        optimizer.step()
        yardstick.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_skipped_step_changes_nothing():
    """Neither a weight nor a moment; and the steps after it are as if it had not been."""
    def after(skipped_at):
        torch.manual_seed(0)
        model = GPT(TINY)
        optimizer = optim.build(model, MUON)
        for step in range(4):
            if step == skipped_at:
                for p in model.parameters():
                    p.grad = torch.full_like(p, float("nan"))
                optim.step(optimizer, torch.tensor(True))
            with_gradients(list(model.parameters()), step)
            optim.step(optimizer, torch.tensor(False))
        return [*model.parameters(), *(t for state in optimizer.state.values()
                                       for t in state.values())]

    for a, b in zip(after(None), after(2), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_step_is_skipped_on_the_device_without_waiting(dtype):
    """As on a GPU, where the flag is not read: with NaN gradients nothing changes, not one bit."""
    params = matrices((6, 4))
    optimizer = Muon([one_group(params)], dtype)
    (group,) = optimizer.param_groups
    with_gradients(params, 0)
    optimizer._step_matrices(group, torch.tensor(False))
    twins = matrices((6, 4))
    twin = Muon([one_group(twins)], dtype)
    with_gradients(twins, 0)
    twin.step()
    before = [p.detach().clone() for p in params]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    for p in params:
        p.grad.fill_(float("nan"))
    optimizer._step_matrices(group, torch.tensor(True))
    for p, was, momentum in zip(params, before, momenta, strict=True):
        assert torch.equal(p, was) and torch.equal(optimizer.state[p]["momentum_buffer"], momentum)


# -- groups and rates ----------------------------------------------------------


def test_groups_go_by_role():
    model = GPT(replace(TINY, tie_weights=False))
    c = replace(MUON, learning_rate=0.01, muon_lr=0.02, embedding_lr=0.3)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: (group["scale"] * 0.01, group.get("packed"), group["weight_decay"])
             for group in optim.groups_of(model, c) for p in group["params"]}
    assert rates.keys() == set(names.values())
    for name, (rate, packed, decay) in rates.items():
        kind = model.roles()[name].kind
        wanted = {"matrix": 0.02, "embedding": 0.3, "head": 0.01, "vector": 0.01}[kind]
        assert rate == pytest.approx(wanted), name
        assert packed == {True: 3 if "c_attn" in name else 1}.get(kind == "matrix"), name
        assert decay == (0.0 if kind == "vector" else 0.1), name
    kinds = {name: role.kind for name, role in model.roles().items()}
    assert kinds["transformer.wte.weight"] == kinds["transformer.wpe.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "head"
    assert GPT(TINY).roles()["transformer.wte.weight"].kind == "head"  # tied


def test_one_curve_scales_every_rate_and_momentum_warms_up():
    c = replace(MUON, learning_rate=0.01, muon_lr=0.02, embedding_lr=0.3, max_iters=30,
                lr_decay_iters=30, min_lr=0.001, muon_momentum=0.95)
    optimizer = optim.build(GPT(replace(TINY, tie_weights=False)), c)
    for step, momentum in ((0, 0.85), (5, 0.9), (10, 0.95), (29, 0.95)):
        lr = optim.learning_rate(step, c)
        optim.set_rates(optimizer, step, lr, c)
        rates = {round(group["lr"] / lr, 6) for group in optimizer.param_groups}
        assert rates == {1.0, 2.0, 30.0}
        for group in optimizer.param_groups:
            assert "packed" not in group or group["momentum"] == pytest.approx(momentum)


def test_trapezoid_by_hand():
    c = OptimConfig(schedule="trapezoid", learning_rate=1.0, min_lr=0.1, warmup_iters=4,
                    lr_decay_iters=100, decay_fraction=0.5)
    assert optim.learning_rate(0, c) == pytest.approx(0.2)
    assert optim.learning_rate(4, c) == optim.learning_rate(50, c) == 1.0
    assert optim.learning_rate(75, c) == pytest.approx(0.1 + 0.9 * 0.5)
    assert optim.learning_rate(100, c) == optim.learning_rate(10**6, c) == pytest.approx(0.1)


def test_rates_need_one_to_follow():
    for settings in ({"optimizer": "muon"}, {"embedding_lr": 0.1}):
        with pytest.raises(ValueError, match="learning_rate=0.0"):
            Config(optim=OptimConfig(learning_rate=0.0, **settings))


@pytest.mark.parametrize("config", [TINY, make_config(1, **vars(TINY))], ids=["gpt", "stitched"])
def test_state_is_known_before_the_first_step(config):
    """A checkpoint of step 0 has all of it, and `load_moments` asks for no more."""
    model = GPT(config)
    optimizer = optim.build(model, MUON)
    names = optim.parameter_names(model, optimizer)
    state = optimizer.state_dict()["state"]
    optim.load_moments({name: state[i] for i, name in enumerate(names)}, model, optimizer)
    assert {name: set(moments) for name, moments in zip(names, state.values(), strict=True)} == {
        name: set(keys) for name, keys in optim.state_keys(model, optimizer).items()}
    kept = sum(optim.moments_per_element(MUON, group) * p.numel()
               for group in optimizer.param_groups for p in group["params"])
    assert kept == sum(t.numel() for moments in state.values() for t in moments.values() if t.ndim)


def test_a_loaded_step_goes_to_the_parameters_device():
    """Fused AdamW on a GPU cannot read one on the host; the meta device stands for the GPU."""
    optimizer = Muon([{"params": [nn.Parameter(torch.zeros(2, device="meta"))], "lr": 0.01,
                       "weight_decay": 0.0}], torch.float32)
    found = optimizer.state_dict()
    found["state"] = {0: {key: torch.zeros(()) if key == "step" else torch.zeros(2)
                          for key in optim.ADAM}}
    optimizer.load_state_dict(found)
    (state,) = optimizer.state.values()
    assert {tensor.device.type for tensor in state.values()} == {"meta"}


# -- ranks ---------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "n"), [(16, 1), (16, 2), (16, 3), (5, 4), (2, 4), (7, 7)])
def test_shard_sizes_are_those_of_chunk(rows, n):
    sizes = [len(part) for part in torch.arange(rows).chunk(n)]
    assert shard_sizes(rows, n) == sizes + [0] * (n - len(sizes))


def share(folder, layout):
    """A rank: by_shares of seven matrices, spread as `layout` says; and what it had to compute."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    replicas = {"ddp": size, "fsdp": 1, "hsdp": 2}[layout]
    mesh = init_device_mesh("cpu", (replicas, size // replicas))
    groups = [mesh.get_group(i) if mesh.size(i) > 1 else None for i in (0, 1)]
    full = torch.arange(7.0 * 5 * 3).view(7, 5, 3)
    sizes = shard_sizes(5, size // replicas)
    mine = [part.clone() for part in full.split(sizes, 1)][mesh.get_local_rank(1)]
    computed = []

    def fn(x):
        computed.append(len(x))
        return 2 * x + x.sum((1, 2), keepdim=True)

    for dtype in (torch.float32, torch.bfloat16):
        got = by_shares(fn, mine.to(dtype), 5, *groups)
        wanted = fn(full.to(dtype)).split(sizes, 1)[mesh.get_local_rank(1)]
        torch.testing.assert_close(got, wanted)
    assert computed[0] == -(-7 // size), computed
    (folder / f"done-{layout}-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize(("layout", "size"), [("ddp", 3), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)])
def test_each_matrix_is_computed_on_one_rank(layout, size, tmp_path):
    assert ranks.run(share, (tmp_path, layout), size, tmp_path / "logs") == [0] * size
    assert len(list(tmp_path.glob("done-*"))) == size


def trained(layout):
    """The weights after five steps of Muon on the same gradients, from the same start."""
    torch.manual_seed(0)
    model, size = GPT(TINY), dist.get_world_size() if dist.is_initialized() else 1
    if layout != "ddp":
        shape = {"shard": size} if layout == "fsdp" else {"replicate": 2, "shard": size // 2}
        mesh = init_device_mesh("cpu", (*shape.values(),), mesh_dim_names=(*shape,))
        fully_shard(model, mesh=mesh)
    optimizer = optim.build(model, MUON)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p in model.parameters():
            p.grad = shard_like(torch.randn(p.shape, generator=generator), p)
        optim.step(optimizer, torch.tensor(False))
    return {name: full_tensor(p.detach()) for name, p in model.named_parameters()}


def train_a_rank(folder, layout):
    dist.init_process_group("gloo")
    weights = trained(layout)
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("ddp", 3), ("fsdp", 3), ("hsdp", 4)])
def test_ranks_have_the_numbers_of_one_process(layout, size, tmp_path):
    """fp32: batches of other sizes may round otherwise, so to 1e-6."""
    assert ranks.run(train_a_rank, (tmp_path, layout), size, tmp_path / "logs") == [0] * size
    one, several = trained("ddp"), torch.load(tmp_path / "weights.pt")
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=0, atol=1e-6)


def test_a_process_alone_shares_with_none():
    assert process_groups(nn.Parameter(torch.zeros(2, 2))) == (None, None)
