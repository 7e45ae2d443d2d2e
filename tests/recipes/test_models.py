from typing import get_args

import keras
import numpy as np
import pytest

from tfaccel.recipes.models import build_network, cnn, mobile
from tfaccel.recipes.schema import Architecture, RecipeError


def test_cnn_has_the_parameters_counted_by_hand():
    model = cnn((8, 8, 1), 10, filters=(4, 6))

    # Kernels 3 x 3 x in x out, four numbers of batch norm per channel, dense with bias.
    kernels = 9 * (1 * 4 + 4 * 4 + 4 * 6 + 6 * 6)
    assert model.count_params() == kernels + 4 * (4 + 4 + 6 + 6) + 6 * 10 + 10
    assert model.output_shape == (None, 10)
    assert model.get_layer("norm_2a").output.shape[1:3] == (4, 4)


def test_cnn_gives_logits_not_probabilities():
    model = cnn((8, 8, 1), 3, filters=(4,))
    outputs = model.predict(np.random.default_rng(0).random((5, 8, 8, 1), np.float32), verbose=0)

    assert model.layers[-1].activation is keras.activations.linear
    assert not np.allclose(outputs.sum(1), 1)


def test_a_tiny_image_is_not_pooled_away():
    assert cnn((2, 2, 1), 2, filters=(4, 4, 4)).output_shape == (None, 2)


def test_mobile_has_the_parameters_counted_by_hand():
    model = mobile((8, 8, 1), 10, stem=8, blocks=[[2, 8, 1], [1, 6, 2]], last=12)

    stem = 9 * 8 + 4 * 8
    first = 8 * 16 + 4 * 16 + 9 * 16 + 4 * 16 + 16 * 8 + 4 * 8
    second = 9 * 8 + 4 * 8 + 8 * 6 + 4 * 6
    assert model.count_params() == stem + first + second + 6 * 12 + 4 * 12 + 12 * 10 + 10
    # Only the first block keeps stride and channels, so only it is residual.
    assert [layer.name for layer in model.layers if "add" in layer.name] == ["block_0_add"]
    assert model.get_layer("block_1_project").output.shape == (None, 4, 4, 6)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_name_builds_a_classifier_of_digits(architecture):
    arguments = {} if architecture in ("cnn", "mobile") else {"width": 0.125}
    model = build_network(architecture, arguments, (8, 8, 1), 10)

    assert model.input_shape == (None, 8, 8, 1)
    assert model.output_shape == (None, 10)


def test_wrong_arguments_are_one_clear_error():
    with pytest.raises(RecipeError, match=r"'widht'.* Did you mean 'width'\?"):
        build_network("MobileNetV2", {"widht": 1.0}, (8, 8, 1), 10)
    with pytest.raises(RecipeError, match="no argument 'classes'"):
        build_network("cnn", {"classes": 3}, (8, 8, 1), 10)
    with pytest.raises(RecipeError, match=r"cannot be built: .*above 0"):
        build_network("cnn", {"filters": [-4]}, (8, 8, 1), 10)
    with pytest.raises(RecipeError, match=r"samples of shape \[64\] cannot be built"):
        build_network("MobileNetV2", {}, (64,), 10)
    with pytest.raises(RecipeError, match=r"samples of shape \[64\] cannot be built"):
        build_network("cnn", {}, (64,), 10)
