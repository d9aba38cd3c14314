"""The fixtures of `shared_fixtures.py` where tests run; the process that hands them to workers imports no PyTorch."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one a core
for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):  # on a GPU the same run twice has not the same bits
    os.environ[name] = ""
for name in ("COLUMNS", "LINES"):  # readline, which pytest imports, sets them: then tables would have that width
    os.environ.pop(name, None)
pytest.register_assert_rewrite("support", "shared_fixtures")


def pytest_configure(config: pytest.Config) -> None:
    """Bring the fixtures in, but not where pytest-xdist has workers for that."""
    option = config.option
    hands_out = getattr(option, "tx", None) and option.dist != "no" and not option.collectonly
    if hasattr(config, "workerinput") or not hands_out:
        config.pluginmanager.import_plugin("shared_fixtures")
