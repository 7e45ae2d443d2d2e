"""Small .tflite files, written by TensorFlow's converter with nothing of ours between."""

import warnings

import keras
import numpy as np

from tfaccel.core.quiet import silence_native_output


def convert(model, path, *, scheme="float32", batch=1, io_dtype=None):
    """Writes a Keras model as .tflite; `batch` None leaves its size open."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    specs = [tf.TensorSpec((batch, *t.shape[1:]), t.dtype, name=t.name) for t in model.inputs]

    @tf.function(input_signature=specs, autograph=False)
    def forward(*inputs):
        return model(list(inputs) if len(inputs) > 1 else inputs[0], training=False)

    with silence_native_output(), warnings.catch_warnings():
        # With integers at its ends it misses the statistics that the representative data give.
        warnings.filterwarnings("ignore", message="Statistics for quantized inputs")
        frozen = convert_variables_to_constants_v2(forward.get_concrete_function())
        converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen])
        if scheme != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if scheme == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if scheme == "int8":
            random = np.random.default_rng(0)
            converter.representative_dataset = lambda: (
                [random.random((1, *t.shape[1:]), np.float32) for t in model.inputs]
                for _ in range(8)
            )
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            dtype = tf.dtypes.as_dtype(io_dtype or "int8")
            converter.inference_input_type = converter.inference_output_type = dtype
        path.write_bytes(converter.convert())
    return path


def export_with_signature(model, folder, path):
    """Writes a Keras model as .tflite by way of a saved model, whose signature comes along."""
    import tensorflow as tf

    with silence_native_output():
        model.export(folder, verbose=False)
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert())
    return path


def classifier(classes=4, shape=(8, 8, 3)):
    """A convolution, a depthwise one and a dense layer, with biases that are not zero."""
    model = keras.Sequential(
        [
            keras.Input(shape, name="image"),
            keras.layers.Conv2D(6, 3, padding="same", activation="relu", name="conv"),
            keras.layers.DepthwiseConv2D(3, strides=2, padding="same", name="depthwise"),
            keras.layers.GlobalAveragePooling2D(name="average"),
            keras.layers.Dense(classes, name="logits"),
        ]
    )
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
    return model


def images(count, shape=(8, 8, 3), seed=1):
    return np.random.default_rng(seed).random((count, *shape), np.float32)
