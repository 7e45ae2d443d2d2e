"""What weights are worth."""

import keras
import numpy as np
import pytest

import tfaccel
from tests.pruning.samples import dense_data, dense_model, image_model, masks_of
from tfaccel.pruning import ConstantSparsity, UpdatePruning, criteria, prune, update_masks
from tfaccel.pruning.criteria import CRITERIA, Given, Magnitude, Random

WEIGHT = np.array([[-3.0, 1.0], [0.0, 2.0]], "float32")


def test_magnitude_is_the_absolute_value():
    assert Magnitude()(WEIGHT, 0).tolist() == [[3.0, 1.0], [0.0, 2.0]]


def test_random_depends_on_the_seed_and_not_on_the_weight():
    scores = Random()(WEIGHT, 5)
    np.testing.assert_array_equal(scores, Random()(-7 * WEIGHT, 5))
    assert (scores != Random()(WEIGHT, 6)).all()
    assert scores.shape == WEIGHT.shape


@pytest.mark.parametrize("name", CRITERIA.names())
def test_round_trips_through_its_config(name):
    criterion = CRITERIA.get(name)
    assert CRITERIA.get(keras.saving.serialize_keras_object(criterion)) == criterion


def test_unknown_criterion_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"magnitude, movement, random, snip.*Did you mean 'magnitude'"
    ):
        CRITERIA.get("magnitudes")


# Movement


def movement_model(begin=4, optimizer=None):
    pruned = prune(
        dense_model(), ConstantSparsity(0.5, begin, frequency=3), criterion="movement", seed=1
    )
    pruned.compile(optimizer or keras.optimizers.SGD(0.1), "mse")
    return pruned


def test_scores_follow_the_gradient_times_the_weight():
    import tensorflow as tf

    x, y = dense_data(8)
    pruned, plain = movement_model(), dense_model()
    with tf.GradientTape() as tape:
        loss = keras.ops.mean((plain(x) - y) ** 2)
    kernels = [layer.kernel for layer in plain.layers]
    gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
    pruned.fit(x, y, batch_size=8, verbose=0, callbacks=[UpdatePruning()])
    for layer, kernel, gradient in zip(pruned.layers, kernels, gradients, strict=True):
        scores = layer.transforms[0][1].state["scores"]
        expected = -0.1 * np.asarray(gradient) * np.asarray(kernel)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-7)
        moved = np.asarray(kernel) - 0.1 * np.asarray(gradient)
        np.testing.assert_allclose(layer.variable("kernel"), moved, rtol=1e-4, atol=1e-6)


def test_pruned_weights_rest_while_their_scores_go_on():
    x, y = dense_data(96)
    pruned = movement_model()
    pruned.fit(x[:32], y[:32], batch_size=8, shuffle=False, verbose=0, callbacks=[UpdatePruning()])
    layer = pruned.layers[0]
    mask = np.asarray(layer.transforms[0][1].state["mask"])
    weight, scores = (np.asarray(v).copy() for v in (layer.variable("kernel"), state(layer)))
    assert mask.mean() == 0.5
    assert (weight[~mask] != 0).all()  # kept, so that a weight can come back
    pruned.train_on_batch(x[:8], y[:8])
    after, scored = np.asarray(layer.variable("kernel")), np.asarray(state(layer))
    np.testing.assert_array_equal(after[~mask], weight[~mask])
    assert (after[mask] != weight[mask]).any()
    assert (scored[~mask] != scores[~mask]).any()


def state(layer):
    return layer.transforms[0][1].state["scores"]


def test_weights_that_shrink_are_pruned_though_they_are_large():
    # One input, two outputs: the large weight must go to zero, the small one must grow.
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, use_bias=False)])
    model.layers[0].kernel.assign([[3.0, 0.2]])
    x = np.ones((64, 1), "float32")
    y = np.tile(np.array([[0.0, 2.0]], "float32"), (64, 1))

    def kept(criterion):
        pruned = prune(
            model, ConstantSparsity(0.5, 4, 4, 1), include="*", criterion=criterion, seed=0
        )
        pruned.compile(keras.optimizers.SGD(0.02), "mse")
        pruned.fit(x, y, batch_size=16, verbose=0, callbacks=[UpdatePruning()])
        return masks_of(pruned).tolist()

    assert kept("movement") == [False, True]
    assert kept("magnitude") == [True, False]


def test_movement_is_saved_in_the_middle(tmp_path):
    x, y = dense_data(32)
    pruned = movement_model()
    pruned.fit(x, y, batch_size=8, verbose=0, callbacks=[UpdatePruning()])
    pruned.save(tmp_path / "movement.keras")
    loaded = tfaccel.load_model(tmp_path / "movement.keras")
    for old, new in zip(pruned.layers, loaded.layers, strict=True):
        np.testing.assert_array_equal(state(old), state(new))
    kernel = tfaccel.strip(loaded).layers[0].get_weights()[0]
    assert (kernel == 0).mean() == 0.5


def test_movement_before_it_could_learn_is_an_error():
    for schedule in (0.5, ConstantSparsity(0.5, begin_step=1)):
        with pytest.raises(ValueError, match="learns its scores while training"):
            prune(dense_model(), schedule, criterion="movement")


# SNIP


def test_snip_keeps_the_largest_gradient_times_weight():
    import tensorflow as tf

    x, y = dense_data(64)
    model = dense_model()
    with tf.GradientTape() as tape:
        loss = keras.ops.mean((model(x) - y) ** 2)
    kernels = [layer.kernel for layer in model.layers]
    gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
    saliency = np.concatenate(
        [
            np.abs(np.asarray(g) * np.asarray(k)).ravel()
            for g, k in zip(gradients, kernels, strict=True)
        ]
    )
    pruned = prune(model, 0.75, criterion="snip", scope="global", data=(x, y), loss="mse")
    update_masks(pruned, 0)
    expected = np.zeros(saliency.size, bool)
    expected[np.argsort(-saliency)[: saliency.size // 4]] = True
    np.testing.assert_array_equal(masks_of(pruned), expected)


def test_snip_needs_data_and_leaves_the_model_as_it_is():
    with pytest.raises(ValueError, match=r"Snip\(\) needs data=\(x, y\) and a loss"):
        prune(dense_model(), 0.5, criterion="snip")
    model = image_model()
    before = [w.copy() for w in model.get_weights()]
    x, y = np.ones((4, 8, 8, 2), "float32"), np.ones((4, 5), "float32")
    prune(model, 0.5, criterion="snip", data=(x, y), loss="mse")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)  # batch-norm statistics among them


# A function of the user's


@keras.saving.register_keras_serializable("tfaccel_tests")
def smallest(weight):
    return -np.abs(weight)


def test_a_function_of_the_kernel(tmp_path):
    pruned = prune(dense_model(), 0.5, criterion=smallest)
    update_masks(pruned, 0)
    by_magnitude = prune(dense_model(), 0.5)
    update_masks(by_magnitude, 0)
    np.testing.assert_array_equal(masks_of(pruned), ~masks_of(by_magnitude))
    pruned.save(tmp_path / "given.keras")
    loaded = tfaccel.load_model(tmp_path / "given.keras")
    assert loaded.layers[0].transforms[0][1].criterion == Given(smallest)
    assert criteria.get(smallest) == Given(smallest)


def test_a_function_with_another_shape_is_an_error():
    pruned = prune(dense_model(), 0.5, criterion=lambda weight: weight.sum())
    with pytest.raises(ValueError, match=r"shape \(12, 16\), but .* gave \(\)"):
        update_masks(pruned, 0)
