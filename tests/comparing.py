"""What it means that two models are the same, and that a model was not touched."""

import json

import keras
import numpy as np

from tfaccel.core import keras_private


def flat_outputs(model, x, training=False):
    return [np.asarray(y) for y in keras.tree.flatten(model(x, training=training))]


def assert_same_outputs(model, other, x, training=False):
    """To the last bit, types included; calls each model once."""
    pairs = zip(flat_outputs(model, x, training), flat_outputs(other, x, training), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def operation_names(model):
    return [operation.name for operation in keras_private.functional_of(model).operations]


def fingerprint(model):
    """All that a function which leaves its argument alone must not change, as comparable data."""
    return {
        "calls": [
            (x.name, len(x._inbound_nodes), len(x._outbound_nodes))
            for x in keras_private.sublayers(model)
        ],
        "operations": [
            (x.name, len(x._inbound_nodes), len(x._outbound_nodes))
            for x in keras_private.functional_of(model).operations
        ],
        "values": [np.asarray(v).tolist() for v in model.variables],
        "trainable": [v.trainable for v in model.variables],
        "flags": [x.trainable for x in keras_private.sublayers(model)],
        "config": json.dumps(model.get_config(), default=repr),
    }
