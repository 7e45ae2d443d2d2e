"""What both ranks of the pipeline's Horovod job run; rank r writes FOLDER/r.json.

horovodrun -np 2 -H localhost:2 python tests/distributed/pipeline_worker.py FOLDER
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import keras

import tfaccel.distributed as hvd
from tests.distributed.pipeline_models import (
    data_of_skipping,
    difference,
    fit_skipping,
    skipping,
    weights_of,
)


def compare(make_optimizer, **how):
    """A pipeline over the ranks against rank 0 alone, with the same batches."""
    # Only rank 0 has the weights that count; the others are to get them.
    ours = skipping(seed=1 + 10 * hvd.rank())
    pipeline = hvd.Pipeline(ours, micro_batches=3, **how)
    history = fit_skipping(pipeline, make_optimizer())
    x, y = data_of_skipping(20, seed=1)
    evaluation = pipeline.evaluate(x, y)["loss"]
    expected = None
    if hvd.rank() == 0:
        plain = skipping()
        before = weights_of(plain)
        expected = {"history": fit_skipping(plain, make_optimizer()), "weights": weights_of(plain)}
        expected["moved"] = float(abs(weights_of(plain) - before).max())
        expected["evaluation"] = plain.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    expected = hvd.broadcast_object(expected)
    return {
        "error": float(abs(weights_of(ours) - expected["weights"]).max()),
        "moved": expected["moved"],
        "history": history,
        "expected": {name: expected["history"][name] for name in history},
        "evaluated": expected["evaluation"],
        "evaluation": evaluation,
        "stages": pipeline.stages,
        "bubble": pipeline.times.bubble,
        "expected bubble": pipeline.times.expected_bubble,
    }


def two_stages():
    return compare(
        lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.5, use_ema=True), cuts=["second"]
    )


def measured():
    """All ranks take the cuts that rank 0 found by its clock."""
    return list(hvd.Pipeline(skipping(), stages=2).cuts)


def two_replicas():
    """One stage on both ranks: they share each batch."""
    return compare(lambda: keras.optimizers.SGD(0.1, momentum=0.9), stages=1)


def saved(folder):
    """A checkpoint in mid-training, written by rank 0 alone."""
    model = skipping()
    pipeline = hvd.Pipeline(model, cuts=["first"])
    path = folder / "checkpoint.keras"
    callbacks = [
        keras.callbacks.ModelCheckpoint(path),
        keras.callbacks.LearningRateScheduler(_rate),
    ]
    fit_skipping(pipeline, keras.optimizers.SGD(0.1), callbacks=callbacks)
    hvd.barrier()
    return {
        "difference": difference(keras.saving.load_model(path), model),
        "rate": float(pipeline.optimizer.learning_rate),
    }


def _rate(epoch):
    return 0.1 / (1 + epoch)


def error_of(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


def train_on_own_data():
    """As with a data set that each rank shuffles in its own way."""
    pipeline = hvd.Pipeline(skipping(), cuts=["first"])
    pipeline.compile("sgd", "mse")
    pipeline.fit(*data_of_skipping(seed=hvd.rank()), verbose=0)


def mistakes():
    """What is wrong is said on both ranks, and neither waits."""
    return {
        "ranks": error_of(lambda: hvd.Pipeline(skipping(), cuts=["first", "sum"])),
        "data": error_of(train_on_own_data),
        "cuts": error_of(lambda: hvd.Pipeline(skipping(), cuts=[["first", "sum"][hvd.rank()]])),
    }


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")
    folder = Path(sys.argv[1])
    hvd.init()
    results = {
        "two_stages": two_stages(),
        "measured": measured(),
        "two_replicas": two_replicas(),
        "saved": saved(folder),
        "mistakes": mistakes(),
    }
    (folder / f"{hvd.rank()}.json").write_text(json.dumps(results))
    hvd.shutdown()


if __name__ == "__main__":
    main()
