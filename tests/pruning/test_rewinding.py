"""Lottery tickets: masks of later, weights of before."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.pruning.samples import dense_data, dense_model, image_model, masks_of
from tfaccel.pruning import ConstantSparsity, UpdatePruning, prune, rewind, update_masks


def trained(start, schedule=0.5, epochs=2):
    pruned = prune(start, schedule)
    pruned.compile(keras.optimizers.Adam(0.05), "mse")
    pruned.fit(*dense_data(), epochs=epochs, verbose=0, callbacks=[UpdatePruning()])
    return pruned


def test_masks_of_later_stand_on_weights_of_before():
    start = dense_model()
    later = trained(start, ConstantSparsity(0.5, 0, frequency=1))
    ticket = rewind(later, start)
    np.testing.assert_array_equal(masks_of(ticket), masks_of(later))
    for plain, old in zip(tfaccel.strip(ticket).layers, start.layers, strict=True):
        kernel, old_kernel = (keras.ops.convert_to_numpy(x.kernel) for x in (plain, old))
        np.testing.assert_array_equal(kernel[kernel != 0], old_kernel[kernel != 0])
        assert (kernel == 0).mean() == 0.5
        np.testing.assert_array_equal(plain.bias, old.bias)


def test_the_models_given_are_not_changed():
    start = dense_model()
    later = trained(start)
    before = [w.copy() for w in (*start.get_weights(), *later.get_weights())]
    rewind(later, start, sparsity=0.9)
    for old, new in zip(before, (*start.get_weights(), *later.get_weights()), strict=True):
        np.testing.assert_array_equal(old, new)


def test_masks_hold_through_training_though_the_schedule_had_gone_on():
    start = dense_model()
    ticket = rewind(trained(start, ConstantSparsity(0.5, 0, frequency=1)), start)
    held = masks_of(ticket)
    ticket.compile(keras.optimizers.Adam(0.1), "mse")
    ticket.fit(*dense_data(), epochs=3, verbose=0, callbacks=[UpdatePruning()])
    np.testing.assert_array_equal(masks_of(ticket), held)
    assert (tfaccel.strip(ticket).layers[0].get_weights()[0] == 0).mean() == 0.5


def test_a_sparsity_is_decided_by_the_trained_weights():
    start = dense_model()
    later = trained(start, 0.2)
    ticket = rewind(later, start, sparsity=0.36)
    kernel = np.abs(tfaccel.strip(later).layers[0].get_weights()[0]).ravel()
    mask = masks_of(ticket)[: kernel.size]
    assert kernel[mask].min() >= kernel[~mask].max()
    assert (~mask).sum() == round(0.36 * kernel.size)


def test_a_pruned_model_of_before_serves_and_statistics_go_back(tmp_path):
    pruned = prune(image_model(), 0.5)
    update_masks(pruned, 0)
    pruned.save(tmp_path / "early.keras")
    pruned.compile("sgd", "mse")
    pruned.fit(np.ones((8, 8, 8, 2)), np.ones((8, 5)), verbose=0, callbacks=[UpdatePruning()])
    early = tfaccel.load_model(tmp_path / "early.keras")
    ticket = rewind(pruned, early)
    moved, back, old = (m.get_layer("norm").get_weights()[2] for m in (pruned, ticket, early))
    assert (moved != old).any()
    np.testing.assert_array_equal(back, old)


def test_errors_come_first():
    start = dense_model()
    with pytest.raises(ValueError, match="found no masks"):
        rewind(start, start)
    undecided = prune(start, 0.5)
    with pytest.raises(ValueError, match=r"none was decided yet.*sparsity="):
        rewind(undecided, start)
    update_masks(undecided, 0)
    other = keras.Sequential([keras.Input((12,)), layers.Dense(3, name="hidden")])
    with pytest.raises(ValueError, match=r"'hidden'.*other weights"):
        rewind(undecided, other)
    with pytest.raises(ValueError, match="sparsity must be a fraction"):
        rewind(undecided, start, sparsity=1.0)
