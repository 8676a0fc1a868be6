"""pytest-benchmark: a training step of each network, and its products, in one group a network."""

from typing import Any

import pytest

from .cases import CASES, Case


@pytest.mark.parametrize("what", ["step", "products"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_step(benchmark: Any, case: Case, what: str) -> None:
    benchmark.group = case.name
    benchmark.extra_info.update(steps=case.steps, gemm_flops=case.gemm_flops * case.steps)
    benchmark.pedantic(case.fit() if what == "step" else case.products(), rounds=5, warmup_rounds=1)
