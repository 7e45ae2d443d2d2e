"""The whole network: counts, learning, files."""

import keras
import numpy as np
import pytest

from tfaccel.architectures.lsh_attention import LSHSelfAttention
from tfaccel.architectures.reformer import AxialPositionEmbedding, NormalizedLayer, Reformer
from tfaccel.core.artifacts import load_model
from tfaccel.export import to_tflite
from tfaccel.measurement import TFLiteModel, count
from tfaccel.measurement.flatbuffer import TFLiteFile

TINY = {"depth": 2, "width": 16, "heads": 2, "feed_forward": 24, "bucket_size": 8, "hashes": 2}


def tokens(batch, length, vocabulary=11, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(1, vocabulary, (batch, length)).astype("int32")


def test_counts_by_hand():
    model = Reformer(11, 30, chunks=4, **TINY)
    embeddings = 11 * 16 + 6 * 8 + 5 * 8
    # 2 * ceil(30 / 8) = 8 buckets, hence 4 directions of 8 for each of 2 rounds, not trained.
    attention = 3 * 16 * 16 + 8 * 2 * 4
    feed_forward = 16 * 24 + 24 + 24 * 16 + 16
    head = 2 * 32 + 32 * 11 + 11
    blocks = 2 * (attention + feed_forward + 2 * 2 * 16)
    counts = count(model)
    assert counts.parameters == embeddings + blocks + head
    assert counts.parameters - counts.trainable_parameters == 2 * 8 * 2 * 4
    projections = 3 * 30 * 16 * 16
    hashing = 30 * 16 * 2 * 4
    attending = 2 * 32 * 16 * 16 * 2
    dense = 30 * (2 * 16 * 24)
    assert counts.macs == 2 * (projections + hashing + attending + dense) + 30 * 32 * 11


@pytest.mark.parametrize("length", [1, 2, 30, 49, 50])
def test_positions_are_those_of_a_grid(length):
    layer = AxialPositionEmbedding(7, 8, row_features=2)
    y = np.asarray(layer(np.zeros((1, length, 5), "float32")))[0]
    rows, columns = (w[:, 0] if w.shape[1] == 1 else w[0] for w in layer.get_weights())
    expected = [[*rows[t // 8], *columns[t % 8]] for t in range(length)]
    np.testing.assert_array_equal(y, np.array(expected, "float32"))
    assert len({tuple(row) for row in y}) == length


@pytest.mark.exhaustive
def test_learns_to_copy():
    """The paper's own task, section 5: 0w0w, second half to be told from the first."""
    random = np.random.default_rng(0)
    words = random.integers(1, 8, (512, 7))
    zero = np.zeros((512, 1), int)
    sequence = np.concatenate([zero, words, zero, words], axis=1)
    x, y = sequence[:, :-1], sequence[:, 1:]
    second_half = np.arange(15)[None] >= 8
    keras.utils.set_random_seed(0)
    model = Reformer(
        8, 15, depth=2, width=32, heads=2, feed_forward=32, bucket_size=8, hashes=4, chunks=1
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(5e-3), loss, jit_compile=False)
    weight = np.broadcast_to(second_half, y.shape).astype("float32")
    model.fit(x, y, sample_weight=weight, batch_size=64, epochs=25, verbose=0)
    guesses = model.predict(x, verbose=0).argmax(-1)
    accuracy = (guesses == y)[:, 8:].mean()
    assert accuracy > 0.5  # guessing gives 1 / 7


def test_padding_changes_nothing():
    model = Reformer(11, 24, causal=False, classes=3, mask_zero=True, chunks=2, **TINY)
    ids = tokens(2, 24)
    ids[:, 10:] = 0
    y = np.asarray(model(ids))
    assert y.shape == (2, 3)
    # Nobody sees the embedding of what is padding.
    table = model.get_layer("embedding").embeddings
    changed = np.array(table)
    changed[0] += 5
    table.assign(changed)
    np.testing.assert_allclose(model(ids), y, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": False, "classes": 4, "dropout": 0.1}])
def test_survives_save_and_load(options, tmp_path):
    model = Reformer(11, 20, chunks=3, seed=3, **TINY, **options)
    model.save(tmp_path / "m.keras")
    x = tokens(3, 20)
    np.testing.assert_array_equal(model(x), load_model(tmp_path / "m.keras")(x))
    assert model.output_shape == ((None, 4) if options else (None, 20, 11))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_float_file(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = Reformer(11, 20, chunks=3, seed=3, **TINY)
    finally:
        keras.config.set_dtype_policy("float32")
    x = tokens(8, 20)
    artifact = to_tflite(model, tmp_path / "m.tflite", verify_data=x)
    assert artifact.verification.max_abs_error < 1e-4 * artifact.verification.largest_output
    operators = {operator.name for operator in TFLiteFile.read(artifact.path).operators()}
    assert not any("FLEX" in name.upper() or name == "CUSTOM" for name in operators)
    assert {"TOPK_V2", "GATHER", "BATCH_MATMUL"} <= operators


def test_integer_file(tmp_path):
    # One bucket: no hash can come out differently, and what is left is rounding.
    one = Reformer(11, 16, chunks=2, seed=3, **{**TINY, "bucket_size": 16})
    x = tokens(32, 16)
    expected = np.asarray(one(x))
    artifact = to_tflite(one, tmp_path / "one.tflite", "int8", representative_data=x)
    found = TFLiteModel(artifact.path).predict(x)
    assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()
    # Divisions and roots have no integer kernel, and the file says which values stay float.
    assert 0 < len(artifact.float_tensors) < 80

    # With several, rounding moves a few vectors into another bucket, whose outputs are then those
    # of other neighbours: most outputs must be near, and the likeliest token mostly the same.
    several = Reformer(11, 32, chunks=2, seed=3, **TINY)
    x = tokens(32, 32)
    expected = np.asarray(several(x))
    artifact = to_tflite(several, tmp_path / "m.tflite", "int8", representative_data=x)
    errors = np.abs(TFLiteModel(artifact.path).predict(x) - expected)
    assert np.median(errors) < 0.12 * np.abs(expected).mean()
    agreement = TFLiteModel(artifact.path).predict(x).argmax(-1) == expected.argmax(-1)
    assert agreement.mean() > 0.8


def test_normalized_layer_is_made_of_its_parts():
    layer = NormalizedLayer(keras.layers.Dense(4), 0.5, seed=1)
    x = np.random.default_rng(0).normal(size=(2, 50, 4)).astype("float32")
    y = np.asarray(layer(x))
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(y, normal @ np.asarray(layer.layer.kernel), atol=1e-5)
    dropped = np.asarray(layer(x, training=True)) == 0
    assert 0.35 < dropped.mean() < 0.65
    twin = NormalizedLayer.from_config(layer.get_config())
    assert (twin.dropout, twin.seed, twin.layer.units) == (0.5, 1, 4)


def test_blocks_have_hashes_of_their_own():
    model = Reformer(11, 20, seed=3, **TINY)
    functions = model.get_layer("blocks").functions
    layers = [f.layer for f in functions if isinstance(f.layer, LSHSelfAttention)]
    assert len(layers) == 2
    first, second = (np.asarray(layer.rotations) for layer in layers)
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vocabulary": 0}, ValueError, "vocabulary must be above 0"),
        ({"length": 3.5}, TypeError, "length must be int"),
        ({"depth": 0}, ValueError, "depth must be above 0"),
        ({"heads": 3}, ValueError, "heads must divide the width"),
        ({"classes": 0}, ValueError, "classes must be above 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be a fraction"),
        ({"axial_shape": (2, 3)}, ValueError, "axial_shape must have a place"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Reformer(**{"vocabulary": 11, "length": 20, **TINY, **arguments})


def test_positions_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="2 x 3 positions"):
        AxialPositionEmbedding(2, 3)(np.zeros((1, 7, 4), "float32"))
    with pytest.raises(ValueError, match="leave some of the 4 features"):
        AxialPositionEmbedding(2, 3, row_features=4)(np.zeros((1, 6, 4), "float32"))
    with pytest.raises(ValueError, match="rows must be above 0"):
        AxialPositionEmbedding(0, 3)
