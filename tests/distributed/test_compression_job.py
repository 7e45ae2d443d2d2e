"""Compressors over Horovod: two real ranks against the same thing simulated in this process."""

import json
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel.distributed as hvd
from tests.distributed import compression_worker as worker
from tests.distributed.simulated_ranks import Meeting, SimulatedChannel
from tfaccel.distributed.jobs import run_workers

WORKER = Path(__file__).with_name("compression_worker.py")
BATCH, RATE = worker.BATCH, worker.RATE


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compression")
    run_workers([sys.executable, str(WORKER), str(folder)], 2, log=folder / "log", timeout=280)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {**{name: [r[name] for r in ranks] for name in ranks[0]}, "folder": folder}


def gradients_of(model, data, start):
    x, y = (part[start : start + BATCH] for part in data)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    return tape.gradient(loss, model.trainable_variables)


def simulated(compressor, steps=worker.STEPS, rate=RATE):
    """Two ranks in turns: each compresses, then both communicate (in threads of one meeting)."""
    from concurrent.futures import ThreadPoolExecutor

    model = worker.make_model()
    data = [worker.make_data(rank) for rank in (0, 1)]
    meeting = Meeting(2)
    channels = [SimulatedChannel(meeting, rank) for rank in (0, 1)]
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    states = [compressor.init(shapes) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for step in range(steps):
            own = [gradients_of(model, data[rank], step * BATCH) for rank in (0, 1)]

            def exchange(rank, own=own):
                payload, state = compressor.compress(own[rank], states[rank], channels[rank])
                done = compressor.communicate(payload, state, channels[rank])
                states[rank] = done.state
                return compressor.decompress(done.received)

            received, _ = pool.map(exchange, (0, 1))
            for variable, gradient in zip(model.trainable_variables, received, strict=True):
                variable.assign_sub(rate * gradient)
    return worker.flat(model)


@pytest.mark.horovod
@pytest.mark.parametrize("name", worker.COMPRESSORS)
def test_two_ranks_equal_the_simulation(found, name):
    first, second = (weights[name] for weights in found["every_compressor"])
    assert first == second
    wanted = simulated(worker.COMPRESSORS[name])
    # What is rounded to few bits, or chosen by its size, may fall on another side of a limit.
    close = np.isclose(first, wanted, rtol=0, atol=2e-5)
    assert close.mean() > 0.99
    start = worker.flat(worker.make_model())
    assert np.abs(np.subtract(first, start)).max() > 1e-3


@pytest.mark.horovod
def test_the_channel_is_horovods(found):
    for rank, seen in enumerate(found["channel"]):
        assert seen["who"] == [rank, 2]
        assert seen["mean"] == seen["half"] == [5.0, 6.0, 7.0, 8.0, 9.0]
        assert seen["gathered"] == [1, 1, 1, 2, 2, 2, 2, 2]
        assert seen["nothing"] == []


@pytest.mark.horovod
def test_training_that_is_resumed_equals_training_that_was_not_broken(found):
    for seen in found["resume"]:
        np.testing.assert_allclose(seen["restored"], seen["unbroken"], rtol=0, atol=1e-6)
        lost = np.abs(np.subtract(seen["forgotten"], seen["unbroken"])).max()
        assert lost > 1e-4
        assert seen["files"] == [
            "checkpoint-1.compression-0-of-2.npz",
            "checkpoint-1.compression-1-of-2.npz",
        ]
        assert "was saved after 2 updates, but the optimizer has made 5" in seen["late"][1]
        assert seen["missing"][0] == "FileNotFoundError"
        assert "no compression state 'none.compression-" in seen["missing"][1]
        assert seen["kept"] == [True]


@pytest.mark.horovod
def test_another_number_of_ranks_begins_with_the_mean(found):
    path = found["folder"] / "checkpoint-1.keras"
    files = [
        np.load(path.with_name(f"checkpoint-1.compression-{rank}-of-2.npz")) for rank in (0, 1)
    ]
    optimizer = keras.saving.load_model(path).optimizer
    optimizer = hvd.DistributedOptimizer(optimizer, compression=hvd.DGC(0.9, 0.95))
    hvd.restore_compression_state(optimizer, path)
    (exchange,) = worker.hvd.optimizer.exchanges_of(optimizer)
    state = exchange.compressor.get_state()
    assert state["step"] == 2
    for name in ("velocity", "accumulated"):
        mean = (files[0][f"0/{name}"] + files[1][f"0/{name}"]) / 2
        np.testing.assert_allclose(state[name], mean, rtol=1e-6, atol=1e-8)
        assert np.abs(files[0][f"0/{name}"] - files[1][f"0/{name}"]).max() > 1e-4


@pytest.mark.horovod
def test_the_model_file_is_plain_keras(found):
    path = found["folder"] / "checkpoint-1.keras"
    with zipfile.ZipFile(path) as archive:
        assert "tfaccel" not in archive.read("config.json").decode()
    # Iterations and the learning rate; momenta and residuals are elsewhere.
    assert len(keras.saving.load_model(path).optimizer.variables) == 2


@pytest.mark.horovod
def test_every_way_of_training_goes_with_it(found):
    first, second = found["other_ways"]
    assert first == second
    start = worker.flat(worker.make_model())
    for name in ("accumulated", "summed", "mixed_bfloat16", "mixed_float16", "graph"):
        assert np.isfinite(first[name]).all()
        assert np.abs(np.subtract(first[name], start)).max() > 1e-3
    for name in ("eagerly", "several steps", "tape"):
        close = np.isclose(first[name], first["graph"], rtol=0, atol=2e-5)
        assert close.mean() > 0.99
    # Rows of the embedding that only rank 1 has seen have moved as well.
    assert np.isfinite(first["embedding"]).all()


def locally(periods, momentum=0.9, average_optimizer=False):
    """Local SGD of two ranks by hand: weights (and momenta) averaged after these batches."""
    models = [worker.make_model() for _ in range(2)]
    data = [worker.make_data(rank, BATCH * 4) for rank in (0, 1)]
    optimizers = [keras.optimizers.SGD(RATE, momentum=momentum) for _ in range(2)]
    for step in range(4):
        for model, optimizer, own in zip(models, optimizers, data, strict=True):
            gradients = gradients_of(model, own, step * BATCH)
            optimizer.apply(gradients, model.trainable_variables)
        if step + 1 in periods:
            parts = [list(m.trainable_variables) for m in models]
            if average_optimizer:
                for part, optimizer in zip(parts, optimizers, strict=True):
                    part += [v for v in optimizer.variables if len(v.shape)]
            for one, other in zip(*parts, strict=True):
                mean = (one.numpy() + other.numpy()) / 2
                one.assign(mean)
                other.assign(mean)
    return worker.flat(models[0])


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("name", "periods", "average_optimizer"),
    [
        ("every 2", (2, 4), False),
        ("every 1", (1, 2, 3, 4), True),
        ("post local", (1, 2, 4), False),
        ("never alone", (4,), False),
    ],
)
def test_local_sgd_averages_when_it_should(found, name, periods, average_optimizer):
    first, second = (weights[name] for weights in found["local_sgd"])
    assert first == second
    wanted = locally(periods, average_optimizer=average_optimizer)
    np.testing.assert_allclose(first, wanted, rtol=0, atol=2e-6)


@pytest.mark.horovod
def test_what_does_not_go_together_is_an_error_on_both_ranks(found):
    for rank in (0, 1):
        local = found["local_sgd"][rank]
        assert "the optimizer exchanges gradients already" in local["twice"][1]
        assert "The ranks differ in the batches of an epoch" in local["uneven"][1]
        kind, words = found["disagreement"][rank]
        assert kind == "ValueError"
        assert "TopK(ratio=0.01" in words
        assert "TopK(ratio=0.02" in words


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"every": 0}, ValueError, "every must be an int from 1, but got 0"),
        ({"every": 2.0}, TypeError, "every must be int"),
        ({"post_local_from": -1}, ValueError, "post_local_from must be an int from 0"),
        ({"average_optimizer": 1}, TypeError, "average_optimizer must be bool"),
    ],
)
def test_wrong_arguments_of_local_sgd_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        hvd.LocalSGD(**options)


def test_alone_local_sgd_changes_nothing():
    weights = []
    for callbacks in ([], [hvd.LocalSGD(2)]):
        model = worker.make_model()
        model.compile("sgd", "mse")
        data = worker.make_data(0)
        model.fit(*data, BATCH, shuffle=False, verbose=0, callbacks=callbacks)
        weights.append(worker.flat(model))
    assert weights[0] == weights[1]
    empty = keras.Sequential([keras.layers.Dense(3)])
    empty.compile("sgd", "mse")
    with pytest.raises(ValueError, match="needs a built model"):
        empty.fit(*data, verbose=0, callbacks=[hvd.LocalSGD()])
