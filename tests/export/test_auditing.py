"""The audit of operators: what it finds in a sound file, and in one that is made wrong."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.contracts.tables import convolutional, nested
from tests.quantization.networks import calibrate, conv, images, network
from tfaccel.core.graph import flat_layers
from tfaccel.export import audit, conversion, to_tflite
from tfaccel.export.auditing import Audit, check_operators
from tfaccel.export.packing import pack, unpack
from tfaccel.quantization import FakeQuantize, quantize_aware


def body(x):
    x = layers.BatchNormalization()(conv(x, 4, padding="same", name="c"))
    x = layers.ReLU(name="relu")(x)
    x = layers.Add(name="sum")([x, conv(x, 4, padding="same", name="d")])
    x = layers.Dense(8, name="wide")(layers.Reshape((8, 32))(x))
    return layers.Dense(3, name="logits")(layers.GlobalAveragePooling1D(name="pool")(x))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    aware = calibrate(quantize_aware(network(body)))
    path = tmp_path_factory.mktemp("audit") / "m.tflite"
    return aware, to_tflite(aware, path, io_dtype="int8", verify_data=images(32))


def test_every_rounded_value_has_a_row(exported):
    aware, artifact = exported
    rounded = [x for x in flat_layers(aware) if isinstance(x, FakeQuantize)]
    assert len(artifact.audit.operators) == len(rounded) == 7
    assert artifact.audit.missing == ()
    assert artifact.audit.float_tensors == ()
    assert artifact.audit.max_steps <= 1.001
    names = [row.name for row in artifact.audit.operators]
    assert names[:2] == ["image", "relu"]
    assert {"d", "sum", "wide", "logits"} <= set(names)
    assert len({row.tensor for row in artifact.audit.operators}) == 7
    sizes = {row.name: row.values for row in artifact.audit.operators}
    assert sizes["logits"] == 4 * 3  # of four samples
    assert sizes["wide"] == 4 * 8 * 8


def test_audit_of_a_file_that_is_there_is_that_of_its_export(exported):
    aware, artifact = exported
    found = audit(artifact.path, aware, images(32))
    assert found == artifact.audit
    assert found.verification.top1_agreement >= 0.9
    assert audit(artifact.path, aware).verification is None
    assert audit(artifact.path) == Audit((), found.quantized_tensors)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make_model", [convolutional, nested])
def test_any_batch_size_and_nested_models(make_model, tmp_path):
    aware = calibrate(quantize_aware(make_model()))
    for batch_size in (1, 3, None):
        artifact = to_tflite(aware, tmp_path / "m.tflite", batch_size=batch_size)
        assert artifact.audit.missing == ()
        assert artifact.audit.max_steps <= 1.001


def _change(path, name, change):
    """Writes a file in which the bias of the operator that gives a tensor is changed."""
    model = unpack(path.read_bytes())
    (graph,) = model.subgraphs
    (operator,) = [o for o in graph.operators if graph.tensors[o.outputs[0]].name.decode() == name]
    bias = model.buffers[graph.tensors[operator.inputs[2]].buffer]
    integers = np.frombuffer(bytes(bias.data), np.int32)
    bias.data = change(integers).astype(np.int32).view(np.uint8)
    return pack(model)


def test_wrong_operator_is_found_and_only_that(exported, tmp_path):
    aware, artifact = exported
    tensor = next(row.tensor for row in artifact.audit.operators if row.name == "wide")
    wrong = tmp_path / "wrong.tflite"
    # All that follows gets wrong inputs, but computes rightly with them.
    wrong.write_bytes(_change(artifact.path, tensor, lambda bias: bias + 2000))
    found = audit(wrong, aware)
    beyond = {row.name for row in found.operators if row.share_beyond > 0}
    assert beyond == {"wide"}
    with pytest.raises(ValueError, match=r"'wrong.tflite' was not kept: 'wide' is up to \d+ steps"):
        check_operators(found, wrong)


def test_file_with_a_wrong_operator_is_not_kept(exported, tmp_path, monkeypatch):
    aware, artifact = exported
    tensor = next(row.tensor for row in artifact.audit.operators if row.name == "d")
    changed = _change(artifact.path, tensor, lambda bias: -bias + 900)
    monkeypatch.setattr(conversion, "pack", lambda _: changed)
    with pytest.raises(ValueError, match="'d' is up to"):
        to_tflite(aware, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_what_is_float_in_the_file_is_missing_not_wrong(tmp_path):
    aware = calibrate(quantize_aware(network(body)))
    other = calibrate(quantize_aware(network(body), exclude=["wide", "pool", "logits"]))
    path = to_tflite(other, tmp_path / "m.tflite").path
    found = audit(path, aware)
    assert {"wide", "logits"} <= {name.removesuffix("_quantize") for name in found.missing}


def test_deep_network_is_judged_operator_by_operator(tmp_path):
    def deep(x):
        for _ in range(8):
            x = layers.Add()([x, conv(x, 3, padding="same", activation="relu")])
        return layers.Dense(3)(layers.Flatten()(x))

    aware = calibrate(quantize_aware(network(deep)))
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8", verify_data=images(16))
    assert len(artifact.audit.operators) == 18
    assert artifact.audit.max_steps <= 1.001


def test_several_inputs_and_integer_inputs(tmp_path):
    words = keras.Input((5,), dtype="int32", name="words")
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Dense(4)(layers.Flatten()(layers.Embedding(7, 4)(words)))
    y = layers.Dense(4)(layers.Flatten()(image))
    aware = quantize_aware(keras.Model([words, image], layers.Add()([x, y])))
    aware([np.ones((4, 5), "int32"), images(4)], training=True)
    artifact = to_tflite(aware, tmp_path / "m.tflite")
    assert artifact.audit.missing == ()
    assert artifact.audit.max_steps <= 1.001


def test_plain_model_is_refused(exported):
    with pytest.raises(ValueError, match=r"'small' is plain. Use verify"):
        audit(exported[1].path, network(body))
