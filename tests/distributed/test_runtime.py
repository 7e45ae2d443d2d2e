import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel.distributed as hvd
from tfaccel.distributed import runtime


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(runtime, "_alone", False)
    hvd.init()


@pytest.fixture
def launched(monkeypatch):
    """A process that horovodrun started as one of two."""
    monkeypatch.setattr(runtime, "_alone", False)
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "2")


def test_questions_before_init_are_an_error(monkeypatch):
    monkeypatch.setattr(runtime, "_alone", False)
    assert not hvd.is_initialized()
    for ask in (hvd.rank, hvd.size, hvd.local_rank, hvd.local_size, hvd.cross_rank):
        with pytest.raises(ValueError, match=r"Call tfaccel.distributed.init\(\) first"):
            ask()


@pytest.mark.usefixtures("alone")
def test_a_process_of_its_own_is_rank_0_of_1():
    hvd.init()  # a second time does no harm
    assert hvd.is_initialized()
    assert (hvd.rank(), hvd.size(), hvd.local_rank()) == (0, 1, 0)
    assert (hvd.local_size(), hvd.cross_rank()) == (1, 0)
    hvd.shutdown()
    assert not hvd.is_initialized()


@pytest.mark.usefixtures("alone")
def test_collectives_of_one_are_the_identity():
    own = np.arange(3.0)
    for op in hvd.ReduceOp:
        np.testing.assert_array_equal(hvd.allreduce(own, op=op), own)
    np.testing.assert_array_equal(hvd.allgather(own), own)
    np.testing.assert_array_equal(hvd.broadcast(own), own)
    rows = tf.IndexedSlices(own, tf.range(3))
    assert hvd.allreduce(rows) is rows
    thing = object()
    assert hvd.broadcast_object(thing) is thing
    variable = keras.Variable(own)
    hvd.broadcast_variables([variable])
    np.testing.assert_array_equal(variable, own)
    hvd.barrier()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("root", [1, -1])
def test_root_rank_has_to_be_one_of_the_ranks(root):
    with pytest.raises(ValueError, match="one of the 1 ranks of this job, 0 to 0"):
        hvd.broadcast(np.zeros(1), root_rank=root)
    with pytest.raises(TypeError, match=r"root_rank must be an int, but got 0\.0"):
        hvd.broadcast_object(None, root_rank=0.0)


def test_unknown_op_is_named():
    with pytest.raises(
        ValueError, match="op must be one of Average, Sum, Adasum, Min, Max, Product, but got 9"
    ):
        hvd.allreduce(np.zeros(1), op=9)


@pytest.mark.usefixtures("launched")
def test_started_by_horovodrun_without_horovod_says_how_to_build_it(monkeypatch):
    # What import does for a package that is not there.
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.delitem(sys.modules, "horovod.tensorflow", raising=False)
    with pytest.raises(RuntimeError, match=r"tools/build_horovod\.py --install") as caught:
        hvd.init()
    assert "one of 2 workers, but Horovod is not installed" in str(caught.value)


@pytest.mark.usefixtures("launched")
def test_started_by_horovodrun_nothing_runs_before_init():
    with pytest.raises(ValueError, match=r"Call tfaccel\.distributed\.init"):
        hvd.DistributedOptimizer(keras.optimizers.SGD())


def test_a_process_of_its_own_never_loads_horovod():
    code = (
        "import sys, tfaccel.distributed as d; d.init(); assert d.size() == 1; "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'horovod']"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)


@pytest.mark.horovod
def test_collectives_of_two(job):
    first, second = job["collectives"]
    assert first["who"] == [0, 2, 0, 2, 0]
    assert second["who"] == [1, 2, 1, 2, 0]
    for found in (first, second):
        # Rank 0 gives 0, 1, 2 and rank 1 gives 10, 11, 12.
        assert found["average"] == [5, 6, 7]
        assert found["sum"] == [10, 12, 14]
        assert found["min"] == [0, 1, 2]
        assert found["max"] == [10, 11, 12]
        assert found["bfloat16"] == "tf.Tensor([5 6 7], shape=(3,), dtype=bfloat16)"
        assert found["slices"] == [[0.5], [1.0], [0.0]]
        assert found["gathered"] == [[0, 0], [1, 1], [1, 1]]
        assert found["broadcast"] == [10, 11, 12]
        assert found["object"] == {"from": 0}
        assert found["variables"] == [[10, 11, 12], [1, 0], [10, 11, 12], 1]
        assert found["ops"] == [int(op) for op in hvd.ReduceOp]


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("shape", "ValueError", "number 1 of 2 on rank 0 is b:0 (float32 (2,))"),
        ("number", "ValueError", "number 1 of 1 on rank 0 is nothing, and of 2 on rank 1 b:0"),
        ("metrics", "ValueError", "differ in the metrics of an epoch: number 1 of 1 on rank 0 is"),
        ("root", "ValueError", "one of the 2 ranks of this job, 0 to 1, but got 2"),
        ("twice", "ValueError", "is distributed already"),
        ("traced", "RuntimeError", "cannot run inside a tf.function"),
    ],
)
def test_what_differs_between_ranks_is_named_on_all(job, case, kind, words):
    for found in job["mismatches"]:
        assert found[case][0] == kind
        assert words in found[case][1]
