"""The benchmark suite: `python -m benchmarks`, and pytest-benchmark files beside it."""
