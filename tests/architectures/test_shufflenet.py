import keras
import numpy as np
import pytest

from tfaccel.architectures import ShuffleNetV2
from tfaccel.core.graph import Graph


@pytest.mark.parametrize(
    ("shape", "output_stride", "before_pooling"),
    [
        ((8, 8, 1), None, 1),
        ((32, 32, 3), None, 4),
        ((96, 96, 3), None, 3),
        ((96, 96, 3), 16, 6),
        ((96, 96, 3), 8, 12),
    ],
)
def test_stride_suits_the_image(shape, output_stride, before_pooling):
    model = ShuffleNetV2(shape, 10, 0.5, output_stride=output_stride)
    assert model.get_layer("last").output.shape[1:3] == (before_pooling, before_pooling)
    assert model.output_shape == (None, 10)


def test_another_width_scales_the_channels_of_width_1():
    model = ShuffleNetV2((8, 8, 1), 10, 0.25, last_channels=64)
    channels = [
        model.get_layer(f"stage_{stage}_unit_0_concat").output.shape[-1] for stage in (2, 3, 4)
    ]
    # 116, 232, 464 over 4 are 29, 58, 116; 29 halves to 14.5, which rounds to the even 14.
    assert channels == [28, 58, 116]
    assert model.get_layer("last").filters == 64


def test_only_splits_are_no_layers():
    model = ShuffleNetV2((8, 8, 1), 10, 0.5)
    operations = [o for o in model.operations if not isinstance(o, keras.layers.Layer)]
    # One for each unit of stride 1: 3 + 7 + 3.
    assert [type(o).__name__ for o in operations] == ["Split"] * 13
    modules = {type(layer).__module__.partition(".")[0] for layer in model.layers}
    assert modules == {"keras"}


def test_survives_save_load_and_rebuild(tmp_path):
    model = ShuffleNetV2((8, 8, 1), 5, 0.5, last_channels=32)
    model.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("float32")
    expected = model(x)
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "m.keras")(x), expected)
    np.testing.assert_array_equal(Graph.read(model).build()(x), expected)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="width must be above 0"):
        ShuffleNetV2((32, 32, 3), 10, -1.0)
