"""TFMOT's clustering beside `tfaccel.compat.tfmot`, in a process of its own, as tfmot_jobs.py.

Called as `python clustering_jobs.py out.json`.
"""

import json
import sys

import numpy as np

RANDOM = np.random.default_rng(5)
CONVOLUTION = RANDOM.normal(size=(3, 3, 2, 4)).astype("float32")
DENSE = RANDOM.normal(size=(64, 5)).astype("float32")
X = RANDOM.normal(size=(32, 6, 6, 2)).astype("float32")
Y = RANDOM.normal(size=(32, 5)).astype("float32")
CASES = {
    "whole": {"number_of_clusters": 6},
    "sparse": {"number_of_clusters": 6, "preserve_sparsity": True},
    "by channel": {"number_of_clusters": 4, "cluster_per_channel": True},
}


def train(keras, clustering, arguments):
    """The same few lines for both: only the libraries differ. Returns the stripped kernels."""
    model = keras.Sequential(
        [
            keras.layers.InputLayer((6, 6, 2)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(5),
        ]
    )
    convolution, dense = CONVOLUTION.copy(), DENSE.copy()
    if "preserve_sparsity" in arguments:
        convolution[np.abs(convolution) < 0.6] = 0
        dense[np.abs(dense) < 0.6] = 0
    model.set_weights([convolution, np.zeros(4), dense, np.zeros(5)])
    initialization = clustering.CentroidInitialization.LINEAR
    clustered = clustering.cluster_weights(
        model, cluster_centroids_init=initialization, **arguments
    )
    clustered.compile(keras.optimizers.SGD(0.0002), "mse")
    clustered.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    layers = clustering.strip_clustering(clustered).layers
    return [layer.get_weights()[0] for layer in layers if layer.get_weights()]


def main():
    import keras
    import tensorflow_model_optimization as theirs
    import tf_keras

    from tfaccel.compat.tfmot.clustering import keras as ours

    found = {}
    for name, arguments in CASES.items():
        for who, library, backend in (
            ("theirs", theirs.clustering.keras, tf_keras),
            ("ours", ours, keras),
            ("handed over", ours, tf_keras),
        ):
            kernels = train(backend, library, dict(arguments))
            found[f"{name} {who}"] = [np.asarray(kernel).tolist() for kernel in kernels]
    with open(sys.argv[1], "w") as file:  # noqa: PTH123
        json.dump(found, file)


if __name__ == "__main__":
    main()
