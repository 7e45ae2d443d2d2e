import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel.distributed as hvd
from tests.distributed.worker import BATCH, make_data, make_model
from tfaccel.distributed import runtime


def test_names_are_horovods():
    assert hvd.callbacks.BroadcastGlobalVariablesCallback is hvd.BroadcastGlobalVariablesCallback
    assert hvd.callbacks.MetricAverageCallback is hvd.MetricAverageCallback


def test_root_rank_is_checked():
    with pytest.raises(ValueError, match="root_rank must be a rank, from 0, but got -1"):
        hvd.BroadcastGlobalVariablesCallback(-1)
    with pytest.raises(TypeError, match="root_rank must be int"):
        hvd.BroadcastGlobalVariablesCallback("0")
    model = make_model()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="one of the 1 ranks"):
        model.fit(*make_data(4), callbacks=[hvd.BroadcastGlobalVariablesCallback(1)], verbose=0)


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_xla_is_turned_off_where_keras_turned_it_on(device, monkeypatch):
    model = make_model()
    model.compile("sgd", "mse", jit_compile=True)
    model.make_train_function()
    devices = [tf.config.PhysicalDevice("x", kind) for kind in ("CPU", device)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda: devices)
    monkeypatch.setattr(runtime, "workers", lambda: 2)
    hvd.BroadcastGlobalVariablesCallback().set_model(model)
    # On a CPU Keras never chooses XLA: there it is the user's word, and an error at the first step.
    assert model.jit_compile == (device == "CPU")
    assert (model.train_function is None) == (device == "GPU")


def test_unbuilt_model_with_several_steps_at_once_is_refused(monkeypatch):
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", "mse", steps_per_execution=2)
    monkeypatch.setattr(runtime, "workers", lambda: 2)
    callback = hvd.BroadcastGlobalVariablesCallback()
    callback.set_model(model)
    callback.on_train_begin()
    with pytest.raises(ValueError, match="no weights yet, and with steps_per_execution=2"):
        callback.on_train_batch_begin(0)


@pytest.mark.horovod
def test_broadcast_gives_all_ranks_the_state_of_one(job):
    first, second = job["broadcast_callback"]
    assert first["start"] != second["start"]
    assert first["end"] == second["end"]
    assert first["unbuilt"] == second["unbuilt"]
    assert first["rate"] == second["rate"] == pytest.approx(0.02)  # rank 1's


@pytest.mark.horovod
def test_metrics_become_the_mean_over_ranks(job):
    found = job["metric_average"]
    # With a learning rate of 0 each rank's metrics are those of the untrained model on its data.
    own = []
    for rank in (0, 1):
        x, y = make_data(BATCH * 2, seed=rank)
        error = make_model()(x).numpy() - y
        own.append({"loss": (error**2).mean(), "mae": np.abs(error).mean()})
    for name in ("loss", "mae"):
        mean = (own[0][name] + own[1][name]) / 2
        for rank in (0, 1):
            assert found[rank]["own"][name] == pytest.approx(own[rank][name], rel=1e-5)
            assert found[rank]["seen"][name] == pytest.approx(mean, rel=1e-5)
            assert found[rank]["history"][name] == found[rank]["seen"][name]
        assert abs(own[0][name] - mean) > 1e-3
