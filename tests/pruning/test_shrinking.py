"""The heart of channel pruning: the shrunk model is the masked one."""

import keras
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning.channel_graphs import channel_graph
from tests.pruning.masking import outputs_with_masked
from tests.random_models import random_inputs
from tfaccel.pruning.dependencies import read_channels
from tfaccel.pruning.shrinking import shrink
from tfaccel.pruning.tracing import CONSUMES

SEEDS = st.integers(0, 2**31 - 1)


def random_removal(channels, seed):
    """Some units of some groups, never all of one."""
    random = np.random.default_rng(seed)
    removed = [np.zeros(0, np.int64)]
    for group in channels.groups:
        if random.random() < 0.8:
            count = random.integers(1, group.size)
            removed.append(random.choice(group.units, count, replace=False))
    return np.concatenate(removed)


def check(seed, size=None):
    model = channel_graph(seed, size)
    channels = read_channels(model)
    removed = random_removal(channels, seed)
    inputs = random_inputs(model, seed)
    expected = outputs_with_masked(model, channels, removed, CONSUMES, inputs)
    smaller = shrink(model, channels, removed)
    found = [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(smaller(inputs))]
    for mine, theirs in zip(found, expected, strict=True):
        scale = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(mine / scale, theirs / scale, atol=2e-5)
    return model, smaller, removed


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_shrunk_model_equals_the_masked_one(seed):
    check(seed)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_deep_models_too(seed):
    check(seed, size=30)
