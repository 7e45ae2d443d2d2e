import json
import socket
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel.distributed as hvd
from tests.distributed import elastic_worker as worker
from tests.distributed.worker import make_data, make_model, weights_of
from tfaccel.distributed import elastic, restarts, runtime
from tfaccel.distributed.optimizer import exchanges_of

HOSTS = """#!/bin/sh
echo localhost:1
echo 127.0.0.1:1
if [ -e {folder}/grow ]; then echo {name}:1; fi
"""


@pytest.fixture
def compiled():
    model = make_model()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def test_states_go_back_to_what_was_committed(compiled):
    state = elastic.KerasState(compiled, epoch=0, seen=[])
    compiled.fit(*make_data(8), 4, verbose=0)
    state.epoch, state.seen = 1, [3]
    state.commit()
    kept = weights_of(compiled), int(compiled.optimizer.iterations)
    compiled.fit(*make_data(8), 4, verbose=0)
    state.epoch = 2
    state.seen.append(4)
    assert int(compiled.optimizer.iterations) == 4
    state.restore()
    np.testing.assert_array_equal(weights_of(compiled), kept[0])
    assert int(compiled.optimizer.iterations) == kept[1] == 2
    assert (state.epoch, state.seen) == (1, [3])
    state.seen.append(5)
    state.restore()
    assert state.seen == [3]


def test_what_a_compressor_holds_back_is_committed_too():
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1), compression=hvd.DGC(momentum=0.9)
    )
    model.compile(optimizer, "mse")
    state = elastic.KerasState(model)
    (exchange,) = exchanges_of(optimizer)
    model.fit(*make_data(8), 4, verbose=0)
    state.commit()
    kept = {name: value.copy() for name, value in exchange.compressor.get_state().items()}
    model.fit(*make_data(8), 4, verbose=0)

    def differences():
        found = exchange.compressor.get_state()
        return sum(float(np.abs(found[name] - value).max()) for name, value in kept.items())

    assert differences() > 0
    state.restore()
    assert differences() == 0


def test_a_state_of_variables_keeps_values_and_not_views():
    variables = [tf.Variable([1.0, 2.0]), keras.Variable([3.0])]
    state = elastic.TensorFlowState(variables, step=0)
    for variable in variables:
        variable.assign(variable * 10.0)
    state.restore()
    assert [np.asarray(v).tolist() for v in variables] == [[1, 2], [3]]


def test_states_need_weights_and_an_optimizer(compiled):
    unbuilt = keras.Sequential([keras.layers.Dense(1)], name="unbuilt")
    with pytest.raises(ValueError, match=r"Call unbuilt\.build\(input_shape\) first"):
        elastic.KerasState(unbuilt)
    with pytest.raises(ValueError, match="needs its optimizer"):
        elastic.KerasState(make_model())
    with pytest.raises(TypeError, match="model must be Model"):
        elastic.TensorFlowKerasState("model")


def test_a_change_makes_keras_trace_its_steps_anew(compiled):
    compiled.fit(*make_data(8), 4, verbose=0)
    state, calls = elastic.KerasState(compiled), []
    state.register_reset_callbacks([lambda: calls.append(1)])
    assert compiled.train_function is not None
    state.on_reset()
    assert compiled.train_function is None
    assert calls == [1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_callbacks_commit_whole_steps_in_any_order(compiled, order):
    state, committed = elastic.KerasState(compiled, epoch=0, batch=0), []
    state.save = lambda: committed.append(
        (state.epoch, state.batch, int(compiled.optimizer.iterations))
    )
    callbacks = [
        hvd.elastic.CommitStateCallback(state, batches_per_commit=2),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.UpdateEpochStateCallback(state),
    ]
    compiled.fit(*make_data(12), 4, epochs=2, verbose=0, callbacks=[callbacks[i] for i in order])
    # Three batches an epoch, committed after two and after the epoch, and counted on: 4 is 3 + 1.
    assert committed == [(0, 2, 2), (1, 0, 3), (1, 1, 4), (2, 0, 6)]
    # An epoch that goes on after a change: two of its three batches were done before.
    state.batch = 2
    compiled.fit(*make_data(4), 4, verbose=0, callbacks=callbacks[1:])
    assert (state.epoch, state.batch) == (3, 0)


def test_errors_of_a_lost_rank_and_all_others_are_told_apart():
    pytest.importorskip("horovod")
    from horovod.common.exceptions import HorovodInternalError

    def fail(error):
        raise error

    lost = tf.errors.UnknownError(None, None, "Horovod has been shut down.")
    with pytest.raises(HorovodInternalError):
        elastic._attempt(fail, lost)
    own = tf.errors.UnknownError(None, None, "no such file")
    with pytest.raises(tf.errors.UnknownError, match="no such file"):
        elastic._attempt(fail, own)
    with pytest.raises(ZeroDivisionError):
        elastic._attempt(fail, ZeroDivisionError())


def test_outside_of_an_elastic_job_a_function_runs_once(monkeypatch):
    monkeypatch.setattr(runtime, "_alone", False)
    state, calls = elastic.ObjectState(epoch=4), []
    elastic.run(lambda state, step: calls.append((state.epoch, step)))(state, step=2)
    assert calls == [(4, 2)]
    hvd.shutdown()


def test_after_a_change_things_are_numbered_as_on_a_new_worker():
    before, marked = restarts.generation(), restarts.mark()
    first = restarts.numbered("test")
    assert restarts.numbered("test") == first + 1
    restarts.restart(marked)
    assert restarts.numbered("test") == first
    assert restarts.generation() == before + 1


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"workers": 0}, "workers must be an int from 1, but got 0"),
        ({"workers": 2, "min_workers": 3}, "from min_workers=3 to max_workers=2, but got 2"),
        ({"workers": 3, "max_workers": 2}, "from min_workers=1 to max_workers=2, but got 3"),
        ({"workers": 2}, r"'nowhere\.sh' cannot"),
    ],
)
def test_a_job_that_cannot_begin_says_why(numbers, words):
    with pytest.raises(ValueError, match=words):
        hvd.run_elastic_workers(["python"], "nowhere.sh", **numbers)


@pytest.mark.horovod
def test_training_survives_a_killed_worker_and_takes_in_a_new_one(tmp_path):
    hosts = tmp_path / "hosts.sh"
    hosts.write_text(HOSTS.format(folder=tmp_path, name=socket.gethostname()))
    hosts.chmod(0o755)
    command = [sys.executable, str(Path(worker.__file__)), str(tmp_path)]
    log = tmp_path / "job.log"
    hvd.run_elastic_workers(command, hosts, 2, log=log, timeout=500)

    killed = (tmp_path / "killed").read_text()
    batches = {
        path.stem: [json.loads(text) for text in path.read_text().splitlines()]
        for path in tmp_path.glob("*.log")
        if path.stem != "job"
    }
    ends = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(batches) == 3
    assert ends.keys() == batches.keys() - {killed}
    (survivor,) = (pid for pid in ends if batches[pid][0] == [2, 0, 0, 0])
    (newcomer,) = ends.keys() - {survivor}
    # The survivor goes on alone with the very batch that the other one died in.
    place = [worker.KILLED_IN_EPOCH, worker.KILLED_AT_BATCH]
    steps = worker.KILLED_IN_EPOCH * worker.BATCHES + worker.KILLED_AT_BATCH
    index = batches[survivor].index([1, *place, steps])
    assert batches[survivor][index - 1] == [2, *place, steps]
    assert batches[killed][-1] == [2, *place, steps]
    # The newcomer begins where the survivor is.
    begin = [2, worker.COMES_IN_EPOCH, 0, worker.COMES_IN_EPOCH * worker.BATCHES]
    assert batches[newcomer][0] == begin
    assert begin in batches[survivor]
    # No step is lost and none counts twice: the weights are those of one process.
    plain = worker.make_trained_model()
    plain.fit(worker.make_batches(), epochs=worker.EPOCHS, shuffle=False, verbose=0)
    for end in ends.values():
        assert end["size"] == 2
        assert end["steps"] == worker.EPOCHS * worker.BATCHES
        np.testing.assert_allclose(end["weights"], weights_of(plain), rtol=0, atol=1e-6)
