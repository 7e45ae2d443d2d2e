"""What TFMOT itself does, run in a process of its own: TFMOT needs tf_keras and warns on import.

Called as `python tfmot_reference.py in.npz out.npz`.
"""

import sys

import numpy as np


def masks_of_single_weights(given):
    """TFMOT's mask for each weight and sparsity, without any training."""
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl
    from tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule import (
        ConstantSparsity,
    )

    found = {}
    for name in given.files:
        if name.startswith("weight_"):
            sparsity = float(given[name.replace("weight", "sparsity")])
            pruning = pruning_impl.Pruning(
                lambda: 0, [], ConstantSparsity(sparsity, 0), (1, 1), "AVG"
            )
            found[name] = pruning._update_mask(tf.constant(given[name]))[1].numpy()
    return found


def masks_of_patterns(given):
    """TFMOT's masks by blocks and by m-by-n groups, without any training."""
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl
    from tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule import (
        ConstantSparsity,
    )

    found = {}
    for name in given.files:
        for number, (block, pooling, m_by_n, sparsity) in enumerate(PATTERNS):
            if name.startswith("matrix_") or (name.startswith("conv_") and m_by_n):
                pruning = pruning_impl.Pruning(
                    lambda: 1, [], ConstantSparsity(sparsity, 0), block, pooling, m_by_n
                )
                weight = tf.constant(given[name])
                mask = pruning._maybe_update_block_mask(weight)[1]
                found[f"{name}_{number}"] = mask.numpy()
    return found


def masks_of_training(given):
    """TFMOT's masks after every step of training two dense layers."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    found = {}
    for case, (optimizer, schedule) in enumerate(TRAININGS):
        name, arguments = schedule
        model = tf_keras.Sequential(
            [
                tf_keras.layers.InputLayer((12,)),
                tf_keras.layers.Dense(16, activation="relu"),
                tf_keras.layers.Dense(4),
            ]
        )
        model.set_weights([given[f"initial_{i}"] for i in range(4)])
        model = tfmot.sparsity.keras.prune_low_magnitude(
            model, pruning_schedule=getattr(tfmot.sparsity.keras, name)(*arguments)
        )
        model.compile(tf_keras.optimizers.get(optimizer), "mse")
        rows = []

        class Record(tf_keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                wrappers = [layer for layer in self.model.layers if layer.pruning_vars]
                rows.append(  # noqa: B023
                    np.concatenate([w.pruning_vars[0][1].numpy().ravel() for w in wrappers])
                )

        model.fit(
            given["x"],
            given["y"],
            batch_size=8,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[tfmot.sparsity.keras.UpdatePruningStep(), Record()],
        )
        found[f"masks_{case}"] = np.array(rows)
        found[f"kernel_{case}"] = tfmot.sparsity.keras.strip_pruning(model).layers[0].kernel.numpy()
    return found


PATTERNS = [
    ((1, 4), "AVG", None, 0.5),
    ((4, 1), "AVG", None, 0.8),
    ((2, 3), "MAX", None, 0.75),
    ((4, 4), "AVG", None, 0.6),
    ((1, 1), "AVG", (2, 4), 0.5),
    ((1, 1), "AVG", (1, 4), 0.25),
    ((1, 1), "AVG", (5, 8), 0.625),
]
SGD = {"class_name": "SGD", "config": {"learning_rate": 0.05, "momentum": 0.9}}
ADAM = {"class_name": "Adam", "config": {"learning_rate": 0.05}}
TRAININGS = [
    (SGD, ("PolynomialDecay", (0.1, 0.8, 2, 30, 3, 4))),
    (SGD, ("ConstantSparsity", (0.5, 3, -1, 5))),
    (ADAM, ("ConstantSparsity", (0.7, 1, 33, 1))),
    (ADAM, ("PolynomialDecay", (0.0, 0.9, 0, 40, 3, 3))),
]

if __name__ == "__main__":
    with np.load(sys.argv[1]) as inputs:
        masks = {**masks_of_single_weights(inputs), **masks_of_patterns(inputs)}
        np.savez(sys.argv[2], **masks, **masks_of_training(inputs))
