"""Muon: the update of a matrix is its momentum, made orthogonal. Ranks share the work.

    m = lerp(m, g, 1 - momentum)        u = lerp(g, m, momentum)        (Nesterov's momentum)
    p = p (1 - lr * weight_decay) - lr * sqrt(max(1, R / C)) * orthogonal(u)

g is the gradient of a matrix p (R, C); a packed one is several matrices, one below the other, each
made orthogonal by itself. Other parameters are AdamW's. Source: Jordan et al., "Muon: an optimizer
for hidden layers in neural networks", 2024; torch.optim.Muon computes the same, one matrix after
the other, on every rank.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Jordan's
ADAM = ("exp_avg", "exp_avg_sq")


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T in x (n, R, C), in the dtype of x.

    A quintic Newton-Schulz iteration, whose singular values end between 0.7 and 1.2, not at 1; that
    costs nothing. Matrices of 0 stay 0.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for groups with `packed`, fused AdamW for the others.

    A group with `packed` has matrices of one shape, which are made orthogonal in one batch, in
    `dtype`: bfloat16 suffices. All state is allocated at once.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype,
                 betas: tuple[float, float] = (0.9, 0.95)):
        """Each group needs params, lr and weight_decay; its momentum may be set at any step."""
        # load_state_dict moves `step` to the device only where a group is said to be fused.
        super().__init__(groups, {"momentum": 0.95, "betas": betas, "eps": 1e-8, "fused": True})
        self.dtype = dtype
        self.found_inf: Tensor | None = None
        """() fp32; not 0: `step` changes nothing. As GradScaler's"""
        for group in self.param_groups:
            for p in group["params"]:
                if "packed" in group:
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
                else:
                    self.state[p] = {"step": torch.zeros((), device=p.device),
                                     **{key: torch.zeros_like(p) for key in ADAM}}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step, unless `found_inf` says not to. The host does not wait. Every rank must call it."""
        skip = None if self.found_inf is None else self.found_inf > 0
        if skip is not None and skip.device.type == "cpu":  # nothing to wait for
            if skip:
                return
            skip = None
        for group in self.param_groups:
            if group["params"][0].grad is None:
                continue
            if "packed" in group:
                self._step_matrices(group, skip)
            else:
                self._step_adamw(group)

    def _step_matrices(self, group: dict[str, Any], skip: Tensor | None) -> None:
        """Step a group of matrices of one shape; with `skip`, true or false, as if by 0."""
        params = group["params"]
        local, grads = [_local(p) for p in params], [_local(p.grad) for p in params]
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in params]
        if skip is not None:
            grads = [torch.where(skip, m, g) for m, g in zip(momenta, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        update = local[0].new_empty((len(params), *local[0].shape), dtype=self.dtype)
        torch._foreach_copy_(list(update.unbind()),
                             torch._foreach_lerp(grads, momenta, group["momentum"]))

        full_rows, columns = params[0].shape
        rows = full_rows // group["packed"]
        update = by_shares(lambda x: orthogonal(x.view(-1, rows, columns)).view_as(x), update,
                           full_rows, *process_groups(params[0]))
        decay: Tensor | float = group["lr"] * group["weight_decay"]
        # One conversion of all: adding bf16 or a transpose to each fp32 matrix takes three times as
        # long on a CPU.
        update = update.to(local[0].dtype, memory_format=torch.contiguous_format)
        if skip is not None:
            update, decay = update * ~skip, decay * ~skip
        if group["weight_decay"]:
            torch._foreach_mul_(local, 1 - decay)
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        torch._foreach_add_(local, list(update.unbind()), alpha=-rate)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params, (beta1, beta2) = group["params"], group["betas"]
        states = [self.state[p] for p in params]
        first, second = ([state[key] for state in states] for key in ADAM)
        adamw(params, [p.grad for p in params], first, second, [], [s["step"] for s in states],
              fused=True, found_inf=self.found_inf, amsgrad=False, beta1=beta1, beta2=beta2,
              lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
              maximize=False)


# -- sharing the work ------------------------------------------------------------


def process_groups(p: Tensor) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The ranks with the same part of p, and those that have its other rows; None: this one alone.

    DDP: all ranks and None; FSDP: None and all ranks; HSDP: both.
    """
    if isinstance(p, DTensor):
        mesh = p.device_mesh
        return mesh.get_group(0) if mesh.ndim == 2 else None, mesh.get_group(mesh.ndim - 1)
    return (dist.group.WORLD if dist.is_initialized() else None), None


def by_shares(fn: Callable[[Tensor], Tensor], x: Tensor, rows: int,
              replicas: dist.ProcessGroup | None, shards: dist.ProcessGroup | None) -> Tensor:
    """fn of matrices (n, rows, C), each computed by one rank, for x (n, rows here, C) like x.

    `replicas` have the same x, `shards` the other rows, in FSDP's order. Every rank must call it.
    """
    if replicas is None and shards is None:
        return fn(x)
    n, here, columns = x.shape
    n_replicas, n_shards = (1 if g is None else g.size() for g in (replicas, shards))
    each = -(-n // (n_replicas * n_shards))
    padding = x.new_zeros(each * n_replicas * n_shards - n, here, columns)
    mine = torch.cat([x, padding]).chunk(n_replicas)[0 if replicas is None else replicas.rank()]
    if shards is None:
        done = fn(mine)
    else:
        split = [each * columns * size for size in shard_sizes(rows, n_shards)]
        even = [each * columns * here] * n_shards
        flat = x.new_empty(sum(split))
        dist.all_to_all_single(flat, mine.flatten(), split, even, group=shards)
        full = torch.cat([part.view(each, -1, columns) for part in flat.split(split)], 1)
        sizes = shard_sizes(rows, n_shards)
        flat = torch.cat([part.flatten() for part in fn(full).split(sizes, 1)])
        done = torch.empty_like(mine)
        dist.all_to_all_single(done.view(-1), flat, even, split, group=shards)
    if replicas is None:
        return done[:n]
    gathered = x.new_empty(len(done) * n_replicas, here, columns)
    dist.all_gather_into_tensor(gathered, done.contiguous(), group=replicas)
    return gathered[:n]


def shard_sizes(rows: int, ranks: int) -> list[int]:
    """How many rows FSDP gives to each rank: as many to each, but fewer or none to the last."""
    each = -(-rows // ranks)
    return [max(0, min(each, rows - each * rank)) for rank in range(ranks)]


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
