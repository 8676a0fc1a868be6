"""Kernel tests run under sanitizers, in a process that tests/test_emulator.py starts; in another one when asked for."""

from pathlib import Path

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    """Leave this folder out of a run of the whole suite; not of one that names it, or a file in it."""
    asked = ((config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(path == HERE or HERE in path.parents for path in asked) else True
