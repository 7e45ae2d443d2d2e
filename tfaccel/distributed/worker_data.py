"""Data that ends on all ranks at once."""

from typing import Any

import numpy as np

from tfaccel.distributed import restarts, runtime


def end_together(dataset: Any) -> Any:
    """Makes a data set end on every rank as soon as it ends on one.

    A rank whose data runs out leaves the others waiting in the exchange of gradients. `shard` deals
    out equal shares where it can know; this is for files and generators of which each rank has its
    own, with lengths that nobody knows. Before each batch the ranks ask one another, which takes a
    message of one number. Call it last, after `batch` and `prefetch`, on all ranks.

    Args:
        dataset: a `tf.data.Dataset` of dense tensors, in any structure.

    Returns:
        A data set of the same elements; the same one in a process that is alone.

    Raises:
        TypeError: it is no `tf.data.Dataset`, or one of ragged or sparse tensors.
    """
    import tensorflow as tf

    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            f"end_together() needs a tf.data.Dataset, but got {type(dataset).__name__}. Arrays are "
            "dealt out by shard(); tf.data.Dataset.from_generator takes a generator."
        )
    specs = tf.nest.flatten(dataset.element_spec)
    if not all(isinstance(spec, tf.TensorSpec) for spec in specs):
        raise TypeError(f"end_together() needs dense tensors, but got {dataset.element_spec}.")
    number = restarts.numbered("data")  # counted by every rank, so that names agree
    if runtime.workers() == 1:
        return dataset
    name = f"tfaccel_data{number}"

    def everyone_has_one(has_one: Any) -> Any:
        agreed = runtime.horovod().allreduce(
            np.array([has_one], np.int32), op=runtime.horovod().Min, name=name
        )
        return np.bool_(int(agreed[0]) == 1)

    def empty(spec: Any) -> Any:
        shape = [] if spec.shape.rank is None else [size or 0 for size in spec.shape]
        return tf.zeros(shape, spec.dtype)

    def keep(has_one: Any, _: Any) -> Any:
        return tf.ensure_shape(tf.numpy_function(everyone_has_one, [has_one], tf.bool), [])

    real = dataset.map(lambda *parts: (True, parts if len(parts) > 1 else parts[0]))
    nothing = tf.nest.map_structure(empty, dataset.element_spec)
    # After its own end a rank goes on with nothing, only to say so.
    ended = tf.data.Dataset.from_tensors((False, nothing)).repeat()
    options = tf.data.Options()
    # Asked for ahead of time, elements would be asked for by some ranks and never by others.
    options.experimental_optimization.inject_prefetch = False
    together = real.concatenate(ended).take_while(keep).map(lambda _, element: element)
    return together.with_options(options)
