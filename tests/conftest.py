"""Settings that all tests share. Ray's are read when its processes start, so they are set before anything imports it."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

for name, value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)
os.environ.pop("RAY_ADDRESS", None)
# Tests interrupt jobs as a person does: a shell that runs the tests in the background would have all of them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors and real data that may lie beside the repository; tests that need it skip without it."""
    folder = Path(os.environ.get("PERCEIVER_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no folder of golden vectors and data at {folder} (set PERCEIVER_SHARED)")
    return folder
