"""TFMOT's quantizers and hand-over beside `tfaccel.compat.tfmot`, as tfmot_jobs.py.

Called as `python quantization_jobs.py out.json`.
"""

import json
import sys

import numpy as np

RANDOM = np.random.default_rng(5)
KERNEL = RANDOM.normal(size=(3, 3, 2, 4)).astype("float32")
X = RANDOM.normal(size=(16, 12)).astype("float32")
Y = RANDOM.normal(size=(16, 3)).astype("float32")
BITS = (2, 4, 8)


def kernels_rounded_by_tfmot():
    """What TFMOT's own LastValueQuantizer makes of a convolution's kernel, for some bits."""
    import tensorflow as tf
    from tensorflow_model_optimization.quantization.keras import quantizers

    found = {}
    for bits in BITS:
        quantizer = quantizers.LastValueQuantizer(bits, True, True, True)
        ranges = {name: tf.Variable(np.zeros(4, "float32")) for name in ("min_var", "max_var")}
        found[bits] = quantizer(tf.constant(KERNEL), True, ranges).numpy().tolist()
    return found


def handed_over(ours):
    """The kinds of layers that our verbs give for models of tf_keras, with a config of ours."""
    import tf_keras

    quantizers = ours.quantizers

    class FourBits(ours.QuantizeConfig):
        def get_weights_and_quantizers(self, layer):
            return [(layer.kernel, quantizers.LastValueQuantizer(4, False, True, False))]

        def get_activations_and_quantizers(self, layer):
            average = quantizers.MovingAverageQuantizer(8, False, False, False)
            return [(layer.activation, average)]

        def set_quantize_weights(self, layer, quantize_weights):
            layer.kernel = quantize_weights[0]

        def set_quantize_activations(self, layer, quantize_activations):
            layer.activation = quantize_activations[0]

        def get_output_quantizers(self, layer):
            return []

        def get_config(self):
            return {}

    def network(mark):
        hidden = tf_keras.layers.Dense(8, activation="relu")
        return tf_keras.Sequential(
            [tf_keras.layers.InputLayer((12,)), mark(hidden), tf_keras.layers.Dense(3)]
        )

    whole = ours.quantize_model(network(lambda layer: layer))
    marked = network(lambda layer: ours.quantize_annotate_layer(layer, FourBits()))
    with ours.quantize_scope({"FourBits": FourBits}):
        some = ours.quantize_apply(marked, ours.default_8bit.Default8BitQuantizeScheme())
    some.compile("sgd", "mse")
    some.fit(X, Y, verbose=0)
    ours.quantize_annotate_model(network(lambda layer: layer))
    wrapped = next(layer for layer in some.layers if type(layer).__name__ == "QuantizeWrapperV2")
    ((_, quantizer),) = wrapped.quantize_config.get_weights_and_quantizers(wrapped.layer)
    return {
        "whole": [type(layer).__name__ for layer in whole.layers],
        "some": [type(layer).__name__ for layer in some.layers],
        "bits": quantizer.num_bits,
    }


def main():
    found = {"kernels": kernels_rounded_by_tfmot()}

    from tfaccel.compat.tfmot.quantization import keras as ours

    found["handed over"] = handed_over(ours)
    with open(sys.argv[1], "w") as file:  # noqa: PTH123
        json.dump(found, file)


if __name__ == "__main__":
    main()
