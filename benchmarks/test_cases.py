"""pytest-benchmark: every case by every peer that is installed, in one group a case.

`pytest benchmarks --benchmark-json A.json`, then `pytest-benchmark compare A.json`; -k chooses: "train and not torch".
Other than `python -m benchmarks run` this takes all in one process, and each contender's rounds one after another.
"""

from typing import Any

import pytest

from .cases import CASES, Case
from .measure import median_and_spread
from .peers import PEERS, Peer, prepare

CHOICES = [(c, p, v) for c in CASES.values() for p in PEERS.values() for v in p.variants if p.does(v, c)]


@pytest.mark.parametrize("case, peer, variant", CHOICES, ids=lambda v: getattr(v, "name", v))
def test_case(benchmark: Any, case: Case, peer: Peer, variant: str) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    if (prepared := prepare(peer.name, variant, case)) is None:
        pytest.skip(f"{peer.name} cannot")
    benchmark.group = case.name
    benchmark.extra_info.update(versions=peer.versions, unit=case.unit, units=prepared.units,
                                flops=case.flops * prepared.units, bytes=case.bytes * prepared.units)  # fmt: skip
    benchmark.pedantic(prepared.run, rounds=5, warmup_rounds=1)
    if case.flops and benchmark.stats is not None:
        median, _ = median_and_spread(benchmark.stats.stats.data)
        benchmark.extra_info["gflops_per_second"] = case.flops * prepared.units / median / 1e9
