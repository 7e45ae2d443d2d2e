"""The file as it is laid out."""

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from keras import layers

from tests.export import networks
from tests.export.networks import samples
from tfaccel.export import to_tflite
from tfaccel.export.packing import pack, unpack
from tfaccel.measurement.interpreter import TFLiteModel


def data_offsets(path):
    """Where each buffer's data begins in the file, read by offsets alone."""
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    return [buffer._tab.Vector(buffer._tab.Offset(4)) for buffer in buffers if buffer.DataLength()]


def test_weights_stand_at_multiples_of_sixteen(tmp_path):
    # Sizes that leave gaps: 5 * 3 floats, 3 floats, 3 * 7 floats, 7 floats.
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3), layers.Dense(7)])
    for scheme in ("float32", "float16"):
        path = to_tflite(model, tmp_path / "m.tflite", scheme, metadata={"odd": "x" * 13}).path
        offsets = data_offsets(path)
        assert len(offsets) >= 4
        assert not [offset for offset in offsets if offset % 16]


def test_taking_apart_and_putting_together_changes_nothing(tmp_path):
    path = to_tflite(networks.plain(), tmp_path / "m.tflite").path
    again = tmp_path / "again.tflite"
    again.write_bytes(pack(unpack(path.read_bytes())))
    x = samples(4, 12, 12, 3)
    np.testing.assert_array_equal(TFLiteModel(again).predict(x), TFLiteModel(path).predict(x))
    assert again.stat().st_size == path.stat().st_size


def test_file_has_one_signature(tmp_path):
    path = to_tflite(networks.several(), tmp_path / "m.tflite").path
    (signature,) = unpack(path.read_bytes()).signatureDefs
    assert signature.signatureKey == b"serving_default"
    assert [entry.name for entry in signature.inputs] == [b"z_left", b"a_right"]
    assert [entry.name for entry in signature.outputs] == [b"z_out", b"a_out"]
