"""TFMOT beside `tfaccel.compat.tfmot`, in a process of its own: TFMOT needs tf_keras and warns.

Called as `python tfmot_jobs.py out.json`.
"""

import json
import sys

import numpy as np

INITIAL = np.random.default_rng(5)
WEIGHTS = [INITIAL.normal(size=shape).astype("float32") for shape in ((12, 16), (16, 4))]
CASES = {
    "element": {},
    "first_step": {"sparsity_m_by_n": (2, 4)},
    "block": {"block_size": (4, 2), "block_pooling_type": "MAX"},
}
X = INITIAL.normal(size=(64, 12)).astype("float32")
Y = INITIAL.normal(size=(64, 4)).astype("float32")


def train(keras, sparsity, arguments):
    """The same few lines for both: only the libraries differ. Returns the stripped kernels."""
    model = keras.Sequential(
        [
            keras.layers.InputLayer((12,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(4),
        ]
    )
    model.set_weights([WEIGHTS[0], np.zeros(16), WEIGHTS[1], np.zeros(4)])
    schedule = sparsity.PolynomialDecay(0.2, 0.7, begin_step=1, end_step=13, frequency=4)
    pruned = sparsity.prune_low_magnitude(model, pruning_schedule=schedule, **arguments)
    pruned.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    callbacks = [sparsity.UpdatePruningStep()]
    pruned.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    return [layer.get_weights()[0] for layer in sparsity.strip_pruning(pruned).layers]


def main():
    import keras
    import tensorflow_model_optimization as theirs
    import tf_keras

    import tfaccel.compat.tfmot as ours

    found = {}
    for name, arguments in CASES.items():
        for who, library, backend in (
            ("theirs", theirs.sparsity.keras, tf_keras),
            ("ours", ours.sparsity.keras, keras),
            ("handed over", ours.sparsity.keras, tf_keras),
        ):
            kernels = train(backend, library, arguments)
            found[f"{name} {who}"] = [kernel.tolist() for kernel in kernels]
    with open(sys.argv[1], "w") as file:  # noqa: PTH123
        json.dump(found, file)


if __name__ == "__main__":
    main()
