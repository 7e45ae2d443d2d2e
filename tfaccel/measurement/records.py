"""What measuring gives: records with the unit in each name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a model is made of.

    Attributes:
        parameters: numbers in the weights, batch-norm statistics among them; masks and ranges of a
            technique are none.
        trainable_parameters: those that training changes; 0 in a .tflite file.
        macs: multiply-accumulates of one sample; None where the file or the model does not say how
            large its input is or how often a loop runs.
    """

    parameters: int
    trainable_parameters: int
    macs: int | None


@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """What one layer or functional operation of a Keras model is made of.

    Attributes:
        name: of the layer, without the names of the models around it.
        class_name: of the layer; of the inner one where a technique has wrapped it.
        output_shape: of its last call, the batch dimension left out; of several outputs the first.
        parameters: numbers in its weights.
        trainable_parameters: those that training changes.
        macs: multiply-accumulates of one sample, over all calls; None where unknown.
    """

    name: str
    class_name: str
    output_shape: tuple[int | None, ...]
    parameters: int
    trainable_parameters: int
    macs: int | None


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long one call takes.

    Attributes:
        median_ms: milliseconds, median over the runs.
        p95_ms: milliseconds, 95th percentile over the runs.
        runs: timed calls.
    """

    median_ms: float
    p95_ms: float
    runs: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One model file, measured on one device. A figure that does not apply is None.

    Attributes:
        name: what the table calls it.
        format: "tflite" or "keras".
        parameters: numbers in the weights.
        macs: multiply-accumulates of one sample.
        sparsity: share of zeros among the kernel weights, 0 to 1.
        size_bytes: of the file.
        gzip_bytes: of the file, compressed: what a download costs.
        latency_ms: milliseconds for one sample, median; a .tflite on 1 thread, a Keras model on as
            many as its backend takes.
        latency_p95_ms: the same, 95th percentile.
        latency_threads_ms: milliseconds for one sample on `threads` threads, median.
        threads: how many threads `latency_threads_ms` is for.
        peak_memory_bytes: memory for activations and scratch space, weights not included.
        accuracy: share of samples whose largest output is the label, 0 to 1.
        samples: how many samples `accuracy` is over.
        device: processor, cores, and versions of what ran the model.
    """

    name: str
    format: str
    parameters: int
    macs: int | None
    sparsity: float | None
    size_bytes: int
    gzip_bytes: int
    latency_ms: float | None
    latency_p95_ms: float | None
    latency_threads_ms: float | None
    threads: int
    peak_memory_bytes: int | None
    accuracy: float | None
    samples: int | None
    device: str
