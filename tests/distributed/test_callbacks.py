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
def test_an_optimizer_that_exchanges_nothing_is_an_error(job):
    for apart, alike in job["no_exchange"]:
        assert apart[0] == "RuntimeError"
        assert "After 2 batches the weights of the ranks differ: " in apart[1]
        assert "give compile() a DistributedOptimizer" in apart[1]
        assert alike is None


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


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_begin(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))


def train_one_weight(callback, optimizer, epochs=3, batches=2):
    """Trains y = w·x with loss -w, whose gradient is -1 at every step."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros((1, 1))])
    model.compile(optimizer, lambda y, prediction: -prediction)
    recorder = Recorder()
    x = np.ones((4 * batches, 1))
    history = model.fit(
        x, x, 4, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback, recorder]
    ).history
    return recorder.rates, history, float(model.get_weights()[0][0, 0])


def test_learning_rates_follow_a_schedule():
    schedule = hvd.callbacks.LearningRateScheduleCallback
    sgd = keras.optimizers.SGD
    rates, history, _ = train_one_weight(schedule(0.1, 0.5, start_epoch=1), sgd(0.1))
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.1, 0.1, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(history["lr"], [0.1, 0.1, 0.05], rtol=1e-6)
    smooth = schedule(0.1, lambda epoch: 1 + epoch, end_epoch=2, staircase=False)
    rates, _, _ = train_one_weight(smooth, sgd(7.0))
    np.testing.assert_allclose(rates, [0.1, 0.15, 0.2, 0.25, 0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize("correction", [True, False])
def test_momentum_is_corrected_when_the_rate_changes(correction):
    callback = hvd.callbacks.LearningRateScheduleCallback(
        0.1, lambda epoch: (1.0, 3.0, 0.5)[epoch], momentum_correction=correction
    )
    _, _, weight = train_one_weight(callback, keras.optimizers.SGD(0.1, momentum=0.9))
    # Goyal 2017, eq. 10: v = m · (new rate / old rate) · v + rate · g
    expected, velocity, old = 0.0, 0.0, 0.1
    for rate in (0.1, 0.1, 0.3, 0.3, 0.05, 0.05):
        velocity = 0.9 * (rate / old if correction else 1.0) * velocity + rate
        expected, old = expected + velocity, rate
    assert weight == pytest.approx(expected, rel=1e-5)


def test_warm_up_of_one_worker_keeps_the_rate():
    callback = hvd.callbacks.LearningRateWarmupCallback(0.2, warmup_epochs=2)
    rates, _, _ = train_one_weight(callback, keras.optimizers.SGD(0.2))
    np.testing.assert_allclose(rates, [0.2] * 6, rtol=1e-6)


def test_what_has_no_single_rate_is_refused():
    callback = hvd.callbacks.LearningRateScheduleCallback(0.1, 0.5)
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    with pytest.raises(ValueError, match="has a schedule of its own"):
        train_one_weight(callback, keras.optimizers.SGD(decay))
    several = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD())
    with pytest.raises(ValueError, match="no learning rate of its own"):
        train_one_weight(callback, several)
    with pytest.raises(ValueError, match="initial_lr must be above 0"):
        hvd.callbacks.LearningRateScheduleCallback(0, 0.5)


def test_callbacks_of_one_worker_are_keras_own(tmp_path):
    with pytest.raises(ValueError, match="every must be one of"):
        hvd.callbacks.StopTogetherCallback("step")
    model = make_model()
    model.compile("sgd", "mse")
    path = tmp_path / "best.keras"
    data = make_data(8)
    history = model.fit(
        *data,
        4,
        epochs=5,
        verbose=0,
        callbacks=[
            hvd.callbacks.EarlyStopping("loss", min_delta=1e9, patience=2),
            hvd.callbacks.ReduceLROnPlateau("loss", min_delta=1e9, patience=1, factor=0.5),
            hvd.callbacks.ModelCheckpoint(path, save_freq=1),
            hvd.callbacks.StopTogetherCallback(),
        ],
    ).history
    assert len(history["loss"]) == 3
    np.testing.assert_allclose(history["learning_rate"], [0.01, 0.01, 0.005])
    np.testing.assert_array_equal(
        keras.saving.load_model(path).predict(data[0], verbose=0),
        model.predict(data[0], verbose=0),
    )


@pytest.mark.horovod
def test_rates_warm_up_with_every_batch(job):
    for found in job["warmup"]:
        # Two ranks, two epochs of two batches: from 0.8 / 2 to 0.8 by a straight line.
        np.testing.assert_allclose(found["rates"], [0.5, 0.6, 0.7, 0.8, 0.8, 0.8], rtol=1e-6)
        np.testing.assert_allclose(found["history"], [0.6, 0.8, 0.8], rtol=1e-6)


@pytest.mark.horovod
def test_callbacks_decide_by_the_mean_of_all_ranks(job):
    first, second = job["agreements"]
    for found in (first, second):
        # Means of the scores: 3, 2.5, 3, 3.5; best in the second epoch, given up in the fourth.
        assert found["epochs"] == 4
        np.testing.assert_allclose(found["rates"], [0.01] * 6 + [0.005] * 2, rtol=1e-6)
        assert found["stopped after"] == [0, 1]
        assert "'score' is measured on 1 of 2 ranks" in found["on some"][1]
        assert found["run"] == {"rank": 0}
    assert first["weights"] == second["weights"]
    assert (first["saved"], second["saved"]) == (True, False)
    assert (first["on_rank_0"], second["on_rank_0"]) == (2, 0)
    assert first["run fails"][0] == "ValueError"
    assert second["run fails"][0] == "RuntimeError"
    assert "Rank 0 failed in int: ValueError: invalid literal" in second["run fails"][1]
    # Saved once by the mean: the weights of the second epoch, which are not the last.
    saved = keras.saving.load_model(job.folder / "best0.keras")
    assert np.abs(np.concatenate([w.ravel() for w in saved.get_weights()]) - first["weights"]).max()
    assert int(saved.optimizer.iterations) == 4


@pytest.mark.horovod
def test_data_that_ends_on_one_rank_ends_on_all(job):
    first, second = job["unequal_data"]
    assert first == second
    assert first["lengths"] == [3, 3]


def test_data_of_one_worker_stays_as_it_is():
    data = tf.data.Dataset.range(3)
    assert hvd.end_together(data) is data
    with pytest.raises(TypeError, match=r"needs a tf\.data\.Dataset, but got list"):
        hvd.end_together([1])
    with pytest.raises(TypeError, match="dense tensors"):
        hvd.end_together(data.map(tf.ragged.range))


@pytest.mark.horovod
def test_horovods_keras_example_runs(job):
    first, second = job["digits_example"]
    for found in (first, second):
        assert found["accuracy"] == first["accuracy"]
        assert found["test"] > 0.8
    assert first["accuracy"][-1] > first["accuracy"][0]
    assert first["weights"] == second["weights"]
    assert first["saved"][:3] == ["digits-1.keras", "digits-2.keras", "digits-3.keras"]
