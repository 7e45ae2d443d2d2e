"""Augmented versions of samples that can be made again, pixel by pixel."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.distillation.fingerprints import sample_places

Augment = Callable[[Any, Any], Any]
_PROBED_SAMPLES = 4
_PROBED_VIEWS = 2


def view_seeds(seed: int, indices: Any, view: int) -> Any:
    """Returns the seeds of one version of samples: a hash (SplitMix64) of all three numbers.

    It is made of whole numbers only, so that every machine gives the same.

    Args:
        seed: of all versions.
        indices: [batch] int, which samples.
        view: which version of them.

    Returns:
        [batch, 2] int32.
    """
    state = np.full(len(indices), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
    for part in (np.asarray(indices).astype(np.uint64), np.uint64(view)):
        state = _mix(state ^ _mix(part))
    return state.view(np.int32).reshape(-1, 2)


def _mix(state: Any) -> Any:
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def augment_batch(augment: Augment, batch: Any, seeds: Any) -> Any:
    """Returns `augment(sample, seed)` of each sample, for use in a TensorFlow function.

    Args:
        augment: makes a version of one sample.
        batch: a tensor or a structure of tensors, [batch, ...].
        seeds: [batch, 2] int32.
    """
    import tensorflow as tf

    sample = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), batch)
    traced = tf.function(augment).get_concrete_function(sample, tf.TensorSpec([2], tf.int32))
    made = tf.nest.map_structure(
        lambda t: tf.TensorSpec(t.shape, t.dtype), traced.structured_outputs
    )
    return tf.map_fn(lambda pair: traced(*pair), (batch, seeds), fn_output_signature=made)


def viewer(augment: Augment, x: Any) -> Callable[[Any, Any], Any]:
    """Returns a function (numpy batch, seeds) -> numpy batch that augments on the CPU.

    The data set does so on the CPU too, and random operations differ from device to device.

    Args:
        augment: makes a version of one sample.
        x: all samples, for their shapes and types.
    """
    import tensorflow as tf

    # One trace serves batches of any size.
    batch = keras.tree.map_structure(lambda a: tf.TensorSpec((None, *a.shape[1:]), a.dtype), x)
    traced = tf.function(lambda samples, seeds: augment_batch(augment, samples, seeds))
    concrete = traced.get_concrete_function(batch, tf.TensorSpec((None, 2), tf.int32))

    def view(batch: Any, seeds: Any) -> Any:
        with tf.device("CPU:0"):
            made = concrete(tf.nest.map_structure(tf.constant, batch), tf.constant(seeds))
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), made)

    return view


def probe(augment: Augment, x: Any, seed: int, views: int) -> list[list[float]]:
    """Returns a few numbers that tell one augmentation from another: [views, samples].

    Each is the projection of a version of a sample on a fixed random direction, divided by the
    version's norm.

    Raises:
        ValueError: `augment` gives another result when it is asked again.
    """
    places = sample_places(len(keras.tree.flatten(x)[0]), _PROBED_SAMPLES)
    batch = keras.tree.map_structure(lambda array: np.asarray(array[places]), x)
    view = viewer(augment, x)
    found = []
    for number in range(min(views, _PROBED_VIEWS)):
        seeds = view_seeds(seed, places, number)
        once, again = (_project(view(batch, seeds)) for _ in range(2))
        if once != again:
            raise ValueError(
                "augment(sample, seed) gave two versions of a sample for one seed, so that the "
                "student would not see what the teacher saw. Use stateless operations that take "
                "the seed, such as tf.image.stateless_random_crop."
            )
        found.append(once)
    return found


def same_probe(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> bool:
    """Whether two probes are of one augmentation, up to what machines round differently."""
    return np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=0, atol=1e-4)


def _project(batch: Any) -> list[float]:
    leaves = [np.asarray(leaf, "float64") for leaf in keras.tree.flatten(batch)]
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    direction = np.random.default_rng(0).normal(size=flat.shape[1])
    norms = np.maximum(np.linalg.norm(flat, axis=1), 1e-12)
    return [float(value) for value in flat @ direction / norms]
