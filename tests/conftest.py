"""What holds for every test: quiet TensorFlow, fixed seeds, reproducible property tests."""

import importlib.util
import os
import sys

import hypothesis
import pytest

# Before anything imports them; worker processes that tests start inherit it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
# The suite runs in as many processes as there are cores: threads beyond that stand in their way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

# Tracing a model takes as long as it takes, and a failure has to come back on the next run.
hypothesis.settings.register_profile(
    "tfaccel",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tfaccel")


def pytest_collection_modifyitems(items):
    """Keeps what shares a costly fixture in one process, and skips Horovod's tests without it."""
    for item in items:
        if item.path.parent.name == "distributed":  # all files look at one job
            item.add_marker(pytest.mark.xdist_group("distributed"))
        elif item.path.parent.name != "contracts":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
        elif hasattr(item, "callspec"):  # what looks at one trained model
            item.add_marker(pytest.mark.xdist_group(str(item.callspec.params.get("name"))))
    if importlib.util.find_spec("horovod") is not None:
        return
    skip = pytest.mark.skip(reason="needs Horovod (tools/build_horovod.py --install)")
    for item in items:
        if item.get_closest_marker("horovod"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers for a test, whichever tests ran before it."""
    if keras := sys.modules.get("keras"):
        keras.utils.set_random_seed(0)
