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
from tfaccel.pruning.layouts import Layout
from tfaccel.pruning.patterns import Block, Element, NofM

SHAPES = [(7,), (3, 5), (3, 3, 4, 8), (50, 60), (1, 1), (101, 99)]
# TFMOT fails on a single row of blocks, and shifts them where two or more rows are missing.
MATRICES = [(8, 12), (16, 8), (12, 20), (64, 60), (8, 11), (7, 24)]
CONVOLUTIONS = [(3, 3, 8, 5), (1, 1, 16, 4), (3, 3, 3, 8), (2, 2, 6, 7)]
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


def kernels():
    random = np.random.default_rng(4)
    return {
        f"{kind}_{number}": random.normal(size=shape).astype("float32")
        for kind, shapes in (("matrix", MATRICES), ("conv", CONVOLUTIONS))
        for number, shape in enumerate(shapes)
    }


@pytest.fixture(scope="module")
def given():
    x, y = dense_data(160)
    initial = {f"initial_{i}": w for i, w in enumerate(dense_model().get_weights())}
    return {**single_weights(), **kernels(), **initial, "x": x, "y": y}


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


def pattern_of(block, pooling, m_by_n):
    if m_by_n is not None:
        zeros, group = m_by_n
        return NofM(group - zeros, group)
    return Block(*block, pooling={"AVG": "mean", "MAX": "max"}[pooling])


def test_masks_of_blocks_and_of_n_in_m(given, tfmot):
    compared = 0
    for name in kernels():
        for number, (block, pooling, m_by_n, sparsity) in enumerate(tfmot_reference.PATTERNS):
            if f"{name}_{number}" not in tfmot:
                continue
            kernel = given[name]
            layout = Layout(kernel.shape, (kernel.ndim - 2,), (kernel.ndim - 1,))
            pattern = pattern_of(block, pooling, m_by_n)
            (mask,) = pattern.masks([layout.stacked(np.abs(kernel))], sparsity)
            theirs = tfmot[f"{name}_{number}"].astype(bool)
            np.testing.assert_array_equal(layout.unstacked(mask), theirs, err_msg=name)
            compared += 1
    assert compared == 7 * len(MATRICES) + 3 * len(CONVOLUTIONS)


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
