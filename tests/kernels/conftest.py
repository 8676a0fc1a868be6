"""Kernel tests run under sanitizers, in a process that tests/test_emulator.py starts; in another one when asked for."""

import os
import zlib
from pathlib import Path

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    """Leave this folder out of a run of the whole suite; not of one that names it, or a file in it."""
    asked = ((config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(path == HERE or HERE in path.parents for path in asked) else True


def pytest_collection_modifyitems(config, items):
    """Keep the tests of this folder that GPUBACKPROP_KERNELS_PART names: an eighth of them, or the rest."""
    part = os.environ.get("GPUBACKPROP_KERNELS_PART")
    own = {i: zlib.crc32(i.name.encode()) % 8 == 0 for i in items if HERE in i.path.parents}
    left_out = [item for item, eighth in own.items() if part and eighth != (part == "eighth")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
