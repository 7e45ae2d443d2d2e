"""TensorFlow Model Optimization's names on Keras 3: change the import line.

>>> import tfaccel.compat.tfmot as tfmot
>>> tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=0).target_sparsity
0.5
"""

from tfaccel.compat.tfmot import clustering, quantization, sparsity

__all__ = ["clustering", "quantization", "sparsity"]
