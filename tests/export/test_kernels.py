"""Kernels in a file: the integers and the steps that were trained, in as many bits."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers

from tests.quantization.networks import calibrate, conv, images, network, steps_apart
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.export import audit, to_tflite
from tfaccel.export.kernels import store_kernels, trained_kernels
from tfaccel.export.packing import unpack
from tfaccel.export.preparation import prepare
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.pruning import prune, update_masks
from tfaccel.quantization import FakeQuantizeWeights, Scheme, cluster, quantize_aware

TYPES = {value: name for name, value in vars(schema.TensorType).items()}
_KERNELS = {
    schema.BuiltinOperator.CONV_2D: 1,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D: 1,
    schema.BuiltinOperator.FULLY_CONNECTED: 1,
    schema.BuiltinOperator.TRANSPOSE_CONV: 1,
}


def stored(path):
    """Type, integers and scales of each kernel of a file, read without the code under test."""
    model = unpack(path.read_bytes())
    found = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex].builtinCode
            if code not in _KERNELS:
                continue
            tensor = graph.tensors[operator.inputs[_KERNELS[code]]]
            data = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.int8)
            if TYPES[tensor.type] == "INT4":
                data = np.stack([(data << 4) >> 4, data >> 4], -1).ravel()
            data = data[: int(np.prod(tensor.shape))].reshape(tensor.shape)
            found.append((TYPES[tensor.type], data, tensor.quantization))
    return found


def body(x):
    x = layers.ReLU()(layers.BatchNormalization()(conv(x, 6, name="c")))
    x = layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv2D(3, name="d")(x)))
    x = layers.ReLU()(layers.Conv2DTranspose(5, 2, name="t")(x))
    x = layers.Conv1D(5, 3, name="o")(layers.Reshape((25, 5))(x))
    return layers.Dense(4, name="logits")(layers.Flatten()(x))


def trained_integers(aware):
    """Integers of each kernel by the definition of its grid, signs as in Keras."""
    return {
        layer.name: np.asarray(transform.integers(np.asarray(layer.layer.kernel)))
        for layer in flat_layers(aware)
        if isinstance(layer, TransformedLayer)
        for _, transform in layer.transforms
        if isinstance(transform, FakeQuantizeWeights)
    }


@pytest.mark.one_in(5)
@pytest.mark.parametrize("ranges", ["ema", "lsq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_few_bits_stand_in_the_file_as_they_were_trained(bits, ranges, tmp_path):
    aware = calibrate(quantize_aware(network(body), f"w{bits}a8", ranges=ranges))
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.scheme == ("int4" if bits <= 4 else "int8")
    assert artifact.float_tensors == ()
    assert artifact.audit.missing == ()
    assert artifact.audit.max_steps <= 1.001
    integers = trained_integers(aware)
    found = dict(zip(["c", "d", "t", "o", "logits"], stored(artifact.path), strict=True))
    for name, (kind, values, _) in found.items():
        # LiteRT has no transposed convolution of 4 bits.
        assert kind == ("INT4" if bits <= 4 and name != "t" else "INT8")
        ours = integers[name]
        assert np.abs(values).max() <= 2 ** (bits - 1) - 1
        assert sorted(np.abs(values).ravel()) == sorted(np.abs(ours).ravel().astype(int))
    np.testing.assert_array_equal(found["logits"][1], integers["logits"].T)
    np.testing.assert_array_equal(found["o"][1].reshape(5, 3, 5), integers["o"].transpose(2, 0, 1))


def test_steps_are_the_trained_ones_times_the_factor_of_batch_norm(tmp_path):
    aware = calibrate(quantize_aware(network(body), "w4a8", ranges="lsq"))
    path = to_tflite(aware, tmp_path / "m.tflite").path
    ((_, rounding),) = aware.get_layer("c").transforms
    norm = next(x for x in aware.layers if "normalization" in x.name and "quantize" not in x.name)
    factor = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    expected = np.abs(np.ravel(rounding.state["step"]) * factor)
    np.testing.assert_allclose(stored(path)[0][2].scale, expected, rtol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_asymmetric_grid_is_shifted_into_int8(bits, tmp_path):
    scheme = Scheme("mine", bits, 8, trainable=True, symmetric_weights=False)
    aware = calibrate(quantize_aware(network(body), scheme))
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.scheme == "int8"
    assert artifact.audit.max_steps <= 1.001
    integers = trained_integers(aware)["logits"].T
    kind, values, quantization = stored(artifact.path)[-1]
    assert kind == "INT8"
    np.testing.assert_array_equal(values, integers)
    assert set(quantization.zeroPoint) == {0}
    assert np.abs(integers).max() > 2 ** (bits - 1) - 1  # which a symmetric grid has not


def test_asymmetric_grid_of_eight_bits_is_refused(tmp_path):
    scheme = Scheme("mine", 8, 8, trainable=True, symmetric_weights=False)
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2, name="d")])
    model.layers[-1].kernel.assign(np.abs(model.layers[-1].kernel))  # zero is at the end
    aware = calibrate(quantize_aware(model, scheme))
    with pytest.raises(ValueError, match=r"kernel of 'd' has integers up to 255, but int8 ends"):
        to_tflite(aware, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_narrow_values_behind_relus_are_clipped_and_rounded_as_trained(bits, tmp_path):
    aware = calibrate(quantize_aware(network(body), f"w8a{bits}"))
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    assert artifact.audit.max_steps <= 1.001
    file = TFLiteModel(artifact.path, delegates=False)
    file.predict(2.0 * images(1, seed=4))  # beyond what was seen
    narrow = {row.tensor: row for row in artifact.audit.operators if row.name.startswith("re_lu")}
    assert len(narrow) == 3
    for details in file.tensor_details():
        if details["name"] in narrow:
            values = np.array(file.view_tensor(details["index"]))
            assert values.min() >= 127 - (2**bits - 1)
            assert len(np.unique(values)) <= 2**bits


@pytest.mark.parametrize("io_dtype", ["float32", "int16"])
def test_values_of_sixteen_bits(io_dtype, tmp_path):
    def simple(x):
        x = layers.ReLU()(layers.BatchNormalization()(conv(x, 6)))
        return layers.Dense(4)(layers.Flatten()(x))

    model = network(simple)
    aware = calibrate(quantize_aware(model, "int16x8"))
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype=io_dtype)
    assert (artifact.scheme, artifact.float_tensors) == ("int16x8", ())
    kinds = {t.dtype for t in artifact.audit.quantized_tensors.values() if len(t.scales) == 1}
    assert kinds == {"int16"}
    assert artifact.audit.missing == ()
    # A step is 1/256 of what it is in int8, and float32 has no more digits than for a few of them.
    assert artifact.audit.max_steps <= 4
    x = images(32, seed=9)
    assert steps_apart(artifact.path, aware, x).max() <= (8 if io_dtype == "int16" else 0.1)


def test_weights_alone_are_stored_in_four_bits(tmp_path):
    model = network(body)
    for scheme in ("int4_weight_only", quantize_aware(model, "int4_weight_only")):
        given = model if isinstance(scheme, str) else scheme
        artifact = to_tflite(
            given,
            tmp_path / "m.tflite",
            scheme if isinstance(scheme, str) else None,
            verify_data=images(16, seed=9),
        )
        assert artifact.scheme == "int4_weight_only"
        kinds = [kind for kind, _, _ in stored(artifact.path)]
        # LiteRT has neither of these of 4 bits on float values.
        assert kinds == ["INT4", "INT8", "INT8", "INT4", "INT4"]
        # LiteRT rounds the inputs of these layers to int8 as it goes.
        verification = artifact.verification
        assert verification.mean_abs_error <= 0.03 * verification.mean_abs_output


def test_blocks_have_steps_of_their_own(tmp_path):
    def dense(x):
        x = layers.Dense(8, activation="relu", name="first")(layers.Flatten()(x))  # 192 inputs
        return layers.Dense(4, name="second")(x)

    aware = quantize_aware(network(dense), "int4_block32")
    assert not isinstance(aware.get_layer("second"), TransformedLayer)  # 8 inputs
    artifact = to_tflite(aware, tmp_path / "m.tflite", verify_data=images(16, seed=9))
    assert artifact.scheme == "int4_block32"
    kernels = stored_blocks(artifact.path)
    ((integers, steps),) = kernels
    kernel = np.asarray(aware.get_layer("first").layer.kernel)
    rounded = np.asarray(aware.get_layer("first").transforms[0][1].finalize(kernel))
    np.testing.assert_allclose(
        (integers.reshape(8, 6, 32) * steps[..., None]).reshape(8, 192).T, rounded, rtol=1e-6
    )
    verification = artifact.verification
    assert verification.mean_abs_error <= 0.03 * verification.mean_abs_output


def stored_blocks(path):
    model = unpack(path.read_bytes())
    (graph,) = model.subgraphs
    found = []
    for tensor in graph.tensors:
        if TYPES[tensor.type] != "INT4":
            continue
        data = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.int8)
        integers = np.stack([(data << 4) >> 4, data >> 4], -1).reshape(tensor.shape)
        scales = graph.tensors[tensor.quantization.details.scales]
        values = np.frombuffer(bytes(model.buffers[scales.buffer].data), np.float16)
        found.append((integers, values.reshape(scales.shape).astype("float32")))
    return found


def test_zeros_and_clusters_stay_in_a_file_of_four_bits(tmp_path):
    model = network(lambda x: layers.Dense(6, name="d")(layers.Flatten()(x)))
    pruned = prune(model, 0.5, include="d")
    update_masks(pruned, 1)
    aware = quantize_aware(cluster(pruned, 4, seed=1), "w4a8")
    update_masks(aware, 2)
    calibrate(aware)
    ((kind, values, _),) = stored(to_tflite(aware, tmp_path / "m.tflite").path)
    assert kind == "INT4"
    assert (values == 0).mean() >= 0.5
    assert all(len(np.unique(row)) <= 5 for row in values)


def test_kernel_that_is_not_in_the_file_is_named(tmp_path):
    aware = calibrate(quantize_aware(network(body), "w4a8"))
    path = to_tflite(aware, tmp_path / "m.tflite").path
    kernels = trained_kernels(aware, prepare(aware))
    with pytest.raises(ValueError, match=r"kernel of 'c', trained for 4 bits, is not to be found"):
        store_kernels(unpack(path.read_bytes()), kernels, low_bits=True)  # they are there already


def test_types_are_told_by_the_audit(tmp_path):
    aware = calibrate(quantize_aware(network(body), "w4a8"))
    path = to_tflite(aware, tmp_path / "m.tflite").path
    assert [t.dtype for t in audit(path).quantized_tensors.values()].count("int4") == 4
