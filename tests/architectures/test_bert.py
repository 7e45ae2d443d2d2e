"""BERT: what it computes, what it counts, what it shows of its inside."""

import keras
import numpy as np
import pytest
from scipy.special import erf, softmax

from tfaccel.architectures.attention_parts import AttentionScores, PositionEmbedding
from tfaccel.architectures.bert import BERT
from tfaccel.core.artifacts import load_model
from tfaccel.export import to_tflite
from tfaccel.measurement import TFLiteModel, count
from tfaccel.quantization import quantize_aware

TINY = {"depth": 2, "width": 8, "heads": 2, "feed_forward": 12}
LENGTH = 7


def tokens(batch=3, padding=2, vocabulary=11, length=LENGTH):
    ids = np.random.default_rng(0).integers(1, vocabulary, (batch, length)).astype("int32")
    ids[:, length - padding :] = 0
    return ids


def shaken(model):
    """Weights far from their beginning, so that biases, scales and offsets count."""
    random = np.random.default_rng(1)
    model.set_weights([0.5 * random.normal(size=w.shape) for w in model.get_weights()])
    return model


def parameters(vocabulary, length, depth, width, feed_forward, segments=0, classes=None):
    """By hand."""
    embeddings = (vocabulary + length + segments) * width + 2 * width
    attention = 4 * (width * width + width) + 2 * width
    feed = width * feed_forward + feed_forward + feed_forward * width + width + 2 * width
    pooler = width * width + width
    head = 0 if classes is None else pooler + width * classes + classes
    return embeddings + depth * (attention + feed) + head


def test_parameters_are_those_of_bert_base():
    # The reference implementation, which has the pooler but no classes.
    pooler_alone = parameters(30522, 512, 12, 768, 3072, 2, classes=0)
    assert pooler_alone == 109_482_240


@pytest.mark.parametrize("segments", [0, 2])
@pytest.mark.parametrize("classes", [None, 3])
def test_parameters_by_hand(segments, classes):
    model = BERT(11, LENGTH, segments=segments, classes=classes, **TINY)
    assert model.count_params() == parameters(11, LENGTH, 2, 8, 12, segments, classes)


def test_macs_by_hand():
    model = BERT(11, LENGTH, classes=3, **TINY)
    dense = LENGTH * (4 * 8 * 8 + 2 * 8 * 12)
    attending = 2 * LENGTH * LENGTH * 8
    assert count(model).macs == 2 * (dense + attending) + 8 * 8 + 8 * 3


def oracle(model, ids, segments=None):
    """The paper's formulas, in float64."""
    weights = {
        layer.name: [np.asarray(w, "float64") for w in layer.get_weights()]
        for layer in model.layers
    }
    real = (ids != 0)[..., None].astype("float64")

    def dense(name, x):
        return x @ weights[name][0] + weights[name][1]

    def norm(name, x):
        gamma, beta = weights[name]
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * gamma + beta

    x = weights["token_embedding"][0][ids] + weights["position_embedding"][0]
    if segments is not None:
        x = x + weights["segment_embedding"][0][segments]
    x = norm("embedding_norm", x) * real
    seen = {"embeddings": x}
    batch, length, width = x.shape
    for number in range(2):
        block = f"block_{number}"
        parts = [
            dense(f"{block}_{part}", x).reshape(batch, length, 2, width // 2)
            for part in ("query", "key", "value")
        ]
        query, key, value = parts
        scores = np.einsum("bihd,bjhd->bhij", query, key) / np.sqrt(width // 2)
        both = (real * real.transpose(0, 2, 1))[:, None]
        seen[f"{block}_scores"] = scores * both
        hidden = np.broadcast_to(real[:, None, None, :, 0] == 0, scores.shape)
        attention = softmax(np.where(hidden, -np.inf, scores * both), axis=-1)
        mixed = np.einsum("bhij,bjhd->bihd", attention, value).reshape(batch, length, width)
        x = norm(f"{block}_attention_norm", x + dense(f"{block}_attention", mixed))
        y = dense(f"{block}_expand", x)
        y = y * 0.5 * (1 + erf(y / np.sqrt(2)))
        x = norm(f"{block}_norm", x + dense(f"{block}_shrink", y)) * real
        seen[f"{block}_hidden"] = x
    if "logits" in weights:
        x = dense("logits", np.tanh(dense("pooler", x[:, 0])))
    return x, seen


@pytest.mark.parametrize("classes", [None, 3])
def test_computes_the_papers_formulas(classes):
    model = shaken(BERT(11, LENGTH, classes=classes, **TINY))
    ids = tokens()
    expected, seen = oracle(model, ids)
    np.testing.assert_allclose(model(ids), expected, rtol=1e-4, atol=1e-4)
    inside = keras.Model(model.input, {name: model.get_layer(name).output for name in seen})
    found = inside(ids)
    assert len(seen) == 5
    for name, value in seen.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_segments_are_told_by_a_second_input():
    model = shaken(BERT(11, LENGTH, segments=2, **TINY))
    ids, segments = tokens(), (np.arange(LENGTH) > 3)[None].repeat(3, axis=0).astype("int32")
    expected, _ = oracle(model, ids, segments)
    np.testing.assert_allclose(model([ids, segments]), expected, rtol=1e-4, atol=1e-4)


def test_nobody_attends_to_padding():
    model = shaken(BERT(11, LENGTH, **TINY))
    ids = tokens(padding=3)
    y = np.asarray(model(ids))
    assert (y[:, -3:] == 0).all()
    assert (y[:, :-3] != 0).all()
    for layer, row in (("token_embedding", 0), ("position_embedding", slice(-3, None))):
        table = model.get_layer(layer).get_weights()[0]
        table[row] += 5
        model.get_layer(layer).set_weights([table])
    np.testing.assert_allclose(model(ids), y, atol=1e-5)
    # While what is no padding does count.
    assert np.abs(np.asarray(model(tokens(padding=2))) - y)[:, :4].max() > 1e-3


def test_dropout_acts_in_training_only_and_follows_the_seed():
    ids = tokens()
    ones = [BERT(11, LENGTH, dropout=0.5, seed=4, **TINY) for _ in range(2)]
    trained = [np.asarray(model(ids, training=True)) for model in ones]
    np.testing.assert_array_equal(*trained)
    calm = BERT(11, LENGTH, dropout=0.0, seed=4, **TINY)
    assert all("dropout" not in layer.name for layer in calm.layers)
    calm.set_weights(ones[0].get_weights())
    np.testing.assert_allclose(ones[0](ids), calm(ids), atol=1e-6)
    assert np.abs(trained[0] - np.asarray(calm(ids))).max() > 0.1


def test_no_two_parts_begin_alike():
    model = BERT(11, LENGTH, seed=4, **TINY)
    kernels = [
        layer.get_weights()[0]
        for layer in model.layers
        if isinstance(layer, keras.layers.Dense) and layer.kernel.shape == (8, 8)
    ]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels) == 8
    table = BERT(5000, LENGTH, seed=4, **TINY).get_layer("token_embedding").get_weights()[0]
    # A normal distribution of 0.02, cut off at two deviations, which takes 12 % of its spread.
    assert table.std() == pytest.approx(0.02 * 0.8796, rel=0.02)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        mixed = BERT(11, LENGTH, classes=3, **TINY)
    finally:
        keras.config.set_dtype_policy("float32")
    plain = shaken(BERT(11, LENGTH, classes=3, **TINY))
    mixed.set_weights(plain.get_weights())
    ids = tokens()
    assert mixed.get_layer("block_0_hidden").output.dtype == policy.removeprefix("mixed_")
    expected = np.asarray(plain(ids))
    error = np.abs(np.asarray(mixed(ids), "float32") - expected).max()
    assert error < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("jit", [False, True])
def test_learns(jit):
    """Whether token 3 is anywhere in a sequence, which only attention brings to the first token."""
    random = np.random.default_rng(0)
    ids = random.integers(3, 8, (256, 6)).astype("int32")
    ids[:, 0] = 2
    labels = (ids == 3).any(axis=1).astype("int32")
    model = BERT(8, 6, depth=1, width=16, heads=2, classes=2, dropout=0.0, seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(1e-2)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=jit)
    history = model.fit(ids, labels, batch_size=32, epochs=10, verbose=0).history
    assert history["accuracy"][-1] > 0.95
    assert history["accuracy"][0] < 0.9


def test_survives_save_and_load(tmp_path):
    model = shaken(BERT(11, LENGTH, segments=2, classes=3, seed=3, **TINY))
    model.save(tmp_path / "m.keras")
    x = [tokens(), np.ones((3, LENGTH), "int32")]
    loaded = load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model(x), loaded(x))
    np.testing.assert_array_equal(model(x, training=True), loaded(x, training=True))


def test_float_file(tmp_path):
    model = shaken(BERT(11, LENGTH, classes=3, **TINY))
    ids = tokens(batch=4)
    artifact = to_tflite(model, tmp_path / "float.tflite")
    np.testing.assert_allclose(
        TFLiteModel(artifact.path).predict(ids), model(ids), rtol=1e-4, atol=1e-4
    )
    assert count(artifact.path).macs == count(model).macs


def test_trains_quantization_aware(tmp_path):
    model = quantize_aware(BERT(11, LENGTH, classes=3, **{**TINY, "depth": 1}))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=False)
    ids = tokens(batch=8)
    model.fit(ids, np.arange(8) % 3, verbose=0)
    artifact = to_tflite(model, tmp_path / "int8.tflite")
    assert artifact.scheme == "int8"
    assert artifact.float_tensors  # attention and normalization, named
    expected = np.asarray(model(ids))
    found = TFLiteModel(artifact.path).predict(ids)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"heads": 3}, ValueError, "3 heads of 8 features"),
        ({"depth": 0}, ValueError, "depth must be above 0"),
        ({"width": 8.0}, TypeError, "width must be int"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"segments": -1}, ValueError, "segments"),
    ],
)
def test_says_what_is_wrong(options, error, told):
    with pytest.raises(error, match=told):
        BERT(11, LENGTH, **{**TINY, **options})


def test_parts_say_what_is_wrong():
    with pytest.raises(ValueError, match="3 heads do not share 8 features"):
        AttentionScores(3).build([(None, 5, 8), (None, 5, 8), (None, 5, 1)])
    with pytest.raises(ValueError, match="fixed length"):
        PositionEmbedding().build((None, None, 8))
