"""Every operator under pytest-benchmark.

    pytest bench/ --benchmark-only
    pytest bench/ --benchmark-only -k "layernorm and forward"

The cases and the check before timing are those of bench/operators.py. Here a whole call is timed as
the host sees it, launch and wait included, which is what pytest-benchmark's clock can tell.
bench/operators.py times the device's own work, with a flushed L2 cache, against the floor.
"""

import pytest
import torch
from torch._functorch import config as functorch_config

from bench import operators
from bench.ops.check import failures
from bench.ops.peers import OURS, implementations
from common import hardware
from kernels import calls


def pytest_generate_tests(metafunc):
    device = hardware.resolve_device("auto")
    found = [(case, name, device) for case in operators.chosen_cases(operators.Options(), device)
             for name in implementations(case, device)]
    metafunc.parametrize("case, name, device", found,
                         ids=[f"{case} {name}".replace(" ", "-") for case, name, _ in found])
    metafunc.parametrize("phase", operators.PHASES[:2])


def test_operator(benchmark, case, name, device, phase):
    fn = implementations(case, device)[name]
    if isinstance(fn, str):
        pytest.skip(fn)
    with functorch_config.patch(donated_buffer=False):
        try:
            fault = operators.wrong(fn, case, device)
        except failures() as error:
            if name == OURS:
                raise
            pytest.skip(str(error))
        assert not fault
        args, options = calls.arguments(case, device), calls.options(case, device)
        run = operators.phases(fn, args, options)[phase]
        benchmark.group = f"{case}, {phase}"

        def call():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark(call)
