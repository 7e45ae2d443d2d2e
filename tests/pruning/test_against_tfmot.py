"""Masks are TFMOT's to the last bit: of single kernels, and over whole training runs."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest

import tfaccel
from tests.pruning import tfmot_reference
from tests.pruning.samples import Watch, dense_data, dense_model
from tfaccel import pruning
from tfaccel.pruning.patterns import Element

SHAPES = [(7,), (3, 5), (3, 3, 4, 8), (50, 60), (1, 1), (101, 99)]
SPARSITIES = [0.0, 0.1, 1 / 3, 0.5, 0.8, 0.875, 0.99]


def single_weights():
    random = np.random.default_rng(3)
    given = {}
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            name = f"weight_{len(given)}"
            given[name] = random.normal(size=shape).astype("float32")
            given[name.replace("weight", "sparsity")] = sparsity
    return given


@pytest.fixture(scope="module")
def given():
    x, y = dense_data(160)
    initial = {f"initial_{i}": w for i, w in enumerate(dense_model().get_weights())}
    return {**single_weights(), **initial, "x": x, "y": y}


@pytest.fixture(scope="module")
def tfmot(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfmot")
    np.savez(folder / "in.npz", **given)
    script = Path(tfmot_reference.__file__)
    files = [str(folder / "in.npz"), str(folder / "out.npz")]
    command = [sys.executable, "-W", "ignore", str(script), *files]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(folder / "out.npz") as found:
        return dict(found)


def test_masks_of_single_kernels(given, tfmot):
    names = [name for name in given if name.startswith("weight_")]
    assert len(names) == len(SHAPES) * len(SPARSITIES)
    for name in names:
        sparsity = given[name.replace("weight", "sparsity")]
        (mask,) = Element().masks([np.abs(given[name])], sparsity)
        np.testing.assert_array_equal(mask, tfmot[name].astype(bool))


def test_some_masks_give_weights_back(tfmot):
    # Where no weight ever returned, masked and straight-through gradients could not be told apart.
    returned = sum(
        (~before & after).sum()
        for case in range(len(tfmot_reference.TRAININGS))
        for before, after in pairwise(tfmot[f"masks_{case}"].astype(bool))
    )
    assert returned > 20


@pytest.mark.parametrize("case", range(len(tfmot_reference.TRAININGS)))
def test_masks_at_every_step_of_training(case, given, tfmot):
    optimizer, (schedule, arguments) = tfmot_reference.TRAININGS[case]
    model = dense_model()
    pruned = pruning.prune(model, getattr(pruning, schedule)(*arguments))
    pruned.compile(keras.optimizers.get(optimizer), "mse")
    watch = Watch()
    pruned.fit(
        given["x"],
        given["y"],
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[pruning.UpdatePruning(), watch],
    )
    theirs = tfmot[f"masks_{case}"].astype(bool)
    assert np.isfinite(tfmot[f"kernel_{case}"]).all()
    assert (theirs[1:] != theirs[:-1]).any()
    np.testing.assert_array_equal(np.array(watch.masks), theirs)
    kernel = keras.ops.convert_to_numpy(tfaccel.strip(pruned).layers[0].kernel)
    np.testing.assert_allclose(kernel, tfmot[f"kernel_{case}"], atol=1e-4)
