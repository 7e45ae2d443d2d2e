"""What holds for every test: quiet TensorFlow, fixed seeds, reproducible property tests."""

import collections
import functools
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


# Files that take minutes go first, so that at the end no process waits for another's.
LONG = ("test_examples.py", "test_readme.py", "test_runner.py", "test_optimizer.py")


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run every case: also what the markers `one_in` and `exhaustive` leave out",
    )


def pytest_collection_modifyitems(config, items):
    """Leaves cases out of a plain run, and skips Horovod's tests without it."""
    items.sort(key=lambda item: item.path.name not in LONG)
    # What is named is meant.
    if not (config.getoption("--exhaustive") or any("::" in arg for arg in config.args)):
        _leave_out(config, items)
    if importlib.util.find_spec("horovod") is not None:
        return
    skip = pytest.mark.skip(reason="needs Horovod (tools/build_horovod.py --install)")
    for item in items:
        if item.get_closest_marker("horovod"):
            item.add_marker(skip)


def _leave_out(config, items):
    """Keeps the first of every n cases of a test marked `one_in(n)`, none marked `exhaustive`."""
    seen = collections.Counter()
    kept, left = [], []
    for item in items:
        mark = item.get_closest_marker("one_in")
        test = (item.path, item.originalname) if mark else None
        out = item.get_closest_marker("exhaustive") or (mark and seen[test] % mark.args[0])
        (left if out else kept).append(item)
        seen[test] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers for a test, whichever tests ran before it."""
    if keras := sys.modules.get("keras"):
        keras.utils.set_random_seed(0)
        _trace_steps_once(keras)


@functools.cache
def _trace_steps_once(keras):
    """Makes an optimizer's variables before its first step, for time's sake.

    TensorFlow traces a function twice that makes variables, and tracing is what most tests wait
    for. The jobs that tests start do without this.
    """
    if keras.backend.backend() != "tensorflow":
        return
    make = keras.Model.make_train_function

    @functools.wraps(make)
    def build_and_make(self, force=False):
        optimizer = getattr(self, "optimizer", None)
        if self.built and optimizer is not None and not optimizer.built:
            optimizer.build(self.trainable_variables)
        return make(self, force)

    keras.Model.make_train_function = build_and_make
