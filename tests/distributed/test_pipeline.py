import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.distributed.pipeline_models import (
    BATCH,
    SAMPLES,
    data_of_skipping,
    difference,
    fit_skipping,
    skipping,
    weights_of,
)
from tfaccel.distributed import Pipeline, run_workers


def chain(*inner, outputs=2):
    """A Sequential model of an input of 4, some layers and a Dense."""
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((4,)), *inner, layers.Dense(outputs, name="out")])


def random_data(samples=8, outputs=2):
    random = np.random.default_rng(5)
    x = random.normal(size=(samples, 4)).astype("float32")
    return x, random.normal(size=(samples, outputs)).astype("float32")


def test_three_stages_train_as_the_whole_model_does():
    ours, plain = skipping(), skipping()
    pipeline = Pipeline(ours, micro_batches=3, cuts=["second", "sum"])
    expected = fit_skipping(plain, keras.optimizers.Adam(0.01, global_clipnorm=0.5))
    history = fit_skipping(pipeline, keras.optimizers.Adam(0.01, global_clipnorm=0.5))

    assert pipeline.stages[:2] == (("first", "second"), ("sum",))
    assert set(pipeline.stages[2]) == {"third", "join", "out", "aside"}
    assert difference(ours, plain) < 1e-6
    assert history.keys() >= {"loss", "out_mae", "aside_mse", "val_loss", "val_aside_mse"}
    for name, values in history.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)


def test_batch_norm_sees_micro_batches():
    """Its moving mean moves once for each of them: m <- 0.9 m + 0.1 mean, twice a batch."""
    model = chain(layers.BatchNormalization(momentum=0.9, name="norm"))
    x, y = random_data()
    pipeline = Pipeline(model, micro_batches=2, cuts=["norm"])
    pipeline.compile("sgd", "mse")
    pipeline.fit(x, y, batch_size=8, shuffle=False, verbose=0)

    first, second = x[:4].mean(0), x[4:].mean(0)
    expected = 0.9 * (0.1 * first) + 0.1 * second
    np.testing.assert_allclose(model.get_layer("norm").moving_mean, expected, rtol=1e-5)


def test_data_sets_weights_and_integers():
    """Tokens cross a cut, samples have weights, and a data set gives both."""
    keras.utils.set_random_seed(0)

    def make():
        keras.utils.set_random_seed(0)
        tokens = keras.Input((3,), dtype="int32", name="tokens")
        mixed = layers.Reshape((3, 1), name="reshape")(tokens)
        one = layers.Embedding(9, 4, name="embedding")(tokens)
        both = layers.Concatenate(name="join")([one, keras.ops.cast(mixed, "float32")])
        return keras.Model(tokens, layers.Dense(2, name="out")(layers.Flatten(name="flat")(both)))

    random = np.random.default_rng(1)
    x = random.integers(0, 9, (12, 3)).astype("int32")
    y = random.normal(size=(12, 2)).astype("float32")
    weight = random.uniform(size=12).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(6)
    ours, plain = make(), make()
    pipeline = Pipeline(ours, micro_batches=2, cuts=["embedding"])
    for model in (pipeline, plain):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", weighted_metrics=["mae"])
    expected = plain.fit(data, verbose=0, epochs=2, shuffle=False).history
    history = pipeline.fit(data, verbose=0, epochs=2).history

    assert any(t.dtype == "int32" for t in pipeline._stages[1].received)
    assert difference(ours, plain) < 1e-6
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)


def test_shuffling_is_seeded_and_trains_on_every_sample_once():
    seen = []

    class See(layers.Layer):
        def call(self, inputs):
            tf.py_function(lambda rows: seen.extend(rows[:, 0].numpy()), [inputs], [])
            return inputs

    x, y = np.arange(40, dtype="float32").reshape(10, 4), random_data(10)[1]
    pipeline = Pipeline(chain(See(name="see")), micro_batches=2, cuts=["see"])
    pipeline.compile("sgd", "mse")
    pipeline.fit(x, y, batch_size=4, epochs=2, verbose=0, seed=1)
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == x[:, 0].tolist()
    assert first != second


def test_callbacks_stop_training_and_bring_weights_back():
    model = chain(layers.Dense(3, name="hidden"))
    pipeline = Pipeline(model, cuts=["hidden"])
    pipeline.compile(keras.optimizers.SGD(1e3), "mse")  # diverges: the first epoch is the best
    x, y = random_data()
    stop = keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True)
    history = pipeline.fit(x, y, batch_size=8, epochs=9, verbose=0, callbacks=[stop]).history
    assert len(history["loss"]) < 9
    # Restored in the stages too.
    assert pipeline.evaluate(x, y)["loss"] == pytest.approx(
        float(np.mean((pipeline.predict(x, verbose=0) - y) ** 2)), rel=1e-4
    )


def test_stages_are_balanced_by_the_time_of_layers():
    names = [f"d{i}" for i in range(5)]
    model = chain(*(layers.Dense(4, name=name) for name in names))
    seconds = dict(zip([*names, "out"], (1, 1, 4, 1, 1, 2), strict=True))
    pipeline = Pipeline(model, stages=3, layer_seconds=seconds)
    assert pipeline.stages == (("d0", "d1"), ("d2",), ("d3", "d4", "out"))


def twice(name="twice"):
    inputs = keras.Input((4,))
    dense = layers.Dense(4, name=name)
    middle = layers.ReLU(name="middle")(dense(inputs))
    return keras.Model(inputs, layers.Dense(2, name="out")(dense(middle)))


def masked(last=False):
    inputs = keras.Input((5,))
    x = layers.Embedding(7, 4, mask_zero=True, name="embedding")(inputs)
    x = x if last else layers.LSTM(4, name="recurrent")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x), name="masked")


class Own(keras.Model):
    def train_step(self, data):
        return {}


def own():
    inputs = keras.Input((4,))
    return Own(inputs, layers.Dense(2)(inputs))


@pytest.mark.parametrize(
    ("make", "arguments", "kind", "message"),
    [
        (chain, {}, ValueError, "Give stages"),
        (chain, {"stages": 0}, ValueError, "stages must be an int from 1, but got 0"),
        (chain, {"stages": 2}, ValueError, "can be cut in 0 places, but 2 stages need 1"),
        (chain, {"stages": 1, "micro_batches": 1.5}, TypeError, "micro_batches must be an int"),
        (twice, {"cuts": ["middle"]}, ValueError, "'twice' is called on both sides"),
        (twice, {"cuts": ["nothing"]}, ValueError, "no layer 'nothing' to cut the model after"),
        (skipping, {"cuts": ["second", "first"]}, ValueError, "in the order of the layers"),
        (skipping, {"cuts": ["first"], "stages": 3}, ValueError, "1 cuts make 2 stages"),
        (skipping, {"cuts": "first"}, TypeError, "list of layers' names"),
        (masked, {"cuts": ["embedding"]}, ValueError, "carries a mask.* It can be cut after recu"),
        (lambda: masked(last=True), {"stages": 1}, ValueError, "masked loss does not add up"),
        (own, {"stages": 1}, TypeError, "a train_step of its own"),
    ],
)
def test_what_cannot_be_cut_is_said(make, arguments, kind, message):
    with pytest.raises(kind, match=message):
        Pipeline(make(), **arguments)


def test_what_cannot_be_trained_is_said():
    pipeline = Pipeline(skipping(), cuts=["first"])
    with pytest.raises(ValueError, match=r"Call pipeline\.compile"):
        pipeline.fit(*data_of_skipping())
    with pytest.raises(ValueError, match="does not scale the loss"):
        pipeline.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    with pytest.raises(ValueError, match="'mean_squared_error' has 'sum'"):
        pipeline.compile("sgd", ["mae", keras.losses.MeanSquaredError(reduction="sum")])
    pipeline.compile("sgd", "mse")
    with pytest.raises(ValueError, match="as many samples, but got"):
        pipeline.fit(np.zeros((3, 6)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="need targets"):
        pipeline.fit(np.zeros((3, 6)))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("pipeline")
    worker = Path(__file__).with_name("pipeline_worker.py")
    command = [sys.executable, str(worker), str(folder)]
    run_workers(command, 2, log=folder / "job.log", timeout=280)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.horovod
@pytest.mark.parametrize("scenario", ["two_stages", "two_replicas"])
def test_ranks_train_as_one_process_does(ranks, scenario):
    first, second = (found[scenario] for found in ranks)
    for found in (first, second):
        assert found["moved"] > 0.01
        assert found["error"] < 1e-6
        for name, values in found["history"].items():
            np.testing.assert_allclose(values, found["expected"][name], rtol=1e-5)
        assert found["evaluation"] == pytest.approx(found["evaluated"], rel=1e-5)
    assert first["history"] == second["history"]
    assert len(first["stages"]) == (2 if scenario == "two_stages" else 1)
    # (S - 1) / (M + S - 1) of two stages and three micro-batches.
    assert first["expected bubble"] == (0.25 if scenario == "two_stages" else 0)
    assert 0 < first["bubble"] < 1


@pytest.mark.horovod
def test_cuts_by_the_clock_are_the_same_on_all_ranks(ranks):
    assert len(ranks[0]["measured"]) == 1
    assert ranks[0]["measured"] == ranks[1]["measured"]


@pytest.mark.horovod
def test_a_checkpoint_is_a_plain_file_with_all_weights(ranks):
    for found in ranks:
        assert found["saved"]["difference"] == 0
        assert found["saved"]["rate"] == pytest.approx(0.05)


@pytest.mark.horovod
def test_mistakes_are_said_on_all_ranks(ranks):
    for found in ranks:
        assert "3 stages runs on a multiple of 3 ranks" in found["mistakes"]["ranks"]
        assert "differ in the model of the pipeline" in found["mistakes"]["cuts"]
        assert "differ in the first batch" in found["mistakes"]["data"]


def test_samples_of_the_models_are_uneven():
    """What makes the tests above hard: the last batch and the micro-batches are of other sizes."""
    assert SAMPLES % BATCH
    assert BATCH % 3
    assert weights_of(skipping()).size > 100
