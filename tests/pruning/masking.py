"""The full model with some channels masked: what the shrunk one is held against."""

import keras
import numpy as np

from tfaccel.core.transforms import weight_keys
from tfaccel.pruning.dependencies import ChannelMap
from tfaccel.pruning.tracing import CONSUMES, Site


def sites_of(channels: ChannelMap, role: str) -> list[Site]:
    """The axes of weights with a role."""
    return [site for site in channels.trace.sites.values() if site.role == role]


def outputs_with_masked(
    model: keras.Model, channels: ChannelMap, removed: np.ndarray, role: str, inputs
) -> list[np.ndarray]:
    """Outputs of the full model with zeros wherever weights of `role` meet a removed channel.

    With CONSUMES, nothing reads the channels: right for every model. With another role, nothing
    makes them: right only where zero stays zero on the way to their readers.
    """
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    for site in sites_of(channels, role):
        variable = weight_keys(site.layer)[site.key]
        gone = np.isin(channels.trace.units.roots(site.labels), removed)
        value = np.array(keras.ops.convert_to_numpy(variable))
        np.moveaxis(value, site.axis, 0)[gone] = 0
        variable.assign(value)
    outputs = [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(inputs))]
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return outputs


__all__ = ["CONSUMES", "outputs_with_masked", "sites_of"]
