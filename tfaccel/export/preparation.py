"""A Keras model as it is converted: nothing of ours left but ranges, in float32."""

import keras

from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import Strippable, bake_weights, strip
from tfaccel.export.freezing import to_float32
from tfaccel.quantization import freeze_ranges, scheme_of
from tfaccel.rewriting import fold_batch_norm


def prepare(model: keras.Model) -> keras.Model:
    """Returns the model as it is converted: weights baked, ranges fixed, norms folded, float32.

    Raises:
        ValueError: a range was never trained, or a pruning schedule never ran.
    """
    baked = bake_weights(model)
    if scheme_of(model) is not None:
        baked = freeze_ranges(baked)
    elif any(isinstance(layer, Strippable) for layer in flat_layers(baked)):
        # Without ranges there is nothing of ours to keep.
        baked = strip(baked)
    # Folded into the layer behind it, batch norm would take a kernel off its trained grid.
    return fold_batch_norm(to_float32(baked), before=scheme_of(model) is None)
