import os

import pytest

# One thread for each test: the runner starts as many tests at once as there are cores, and threads that wait for a
# busy core by spinning cost more than they bring. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs that are not named: tests compare bits, and start more processes than a machine has GPUs."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
