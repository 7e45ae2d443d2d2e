"""What every worker of the elastic test runs: one is killed in mid-epoch, another one comes.

    horovodrun -np 2 --min-np 1 --host-discovery-script hosts.sh python elastic_worker.py FOLDER

All workers have the same data, so that whatever their number the weights become those of one
process. Each writes what it does to FOLDER/<process id>.log, and in the end to <process id>.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import keras
import tensorflow as tf

import tfaccel.distributed as hvd
from tests.distributed.worker import make_data, make_model, weights_of

BATCH, BATCHES, EPOCHS = 4, 8, 5
KILLED_IN_EPOCH, KILLED_AT_BATCH, COMES_IN_EPOCH = 1, 5, 3
PATIENCE_SECONDS = 300


def make_trained_model():
    model = make_model()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


def make_batches():
    return tf.data.Dataset.from_tensor_slices(make_data(BATCH * BATCHES)).batch(BATCH)


class Trouble(keras.callbacks.Callback):
    """Writes down each batch; dies on rank 0 in mid-epoch; waits for the worker that comes."""

    def __init__(self, state, folder):
        super().__init__()
        self.state, self.folder = state, folder

    def on_train_batch_begin(self, batch, logs=None):
        state, size = self.state, hvd.size()
        with (self.folder / f"{os.getpid()}.log").open("a") as file:
            steps = int(self.model.optimizer.iterations)
            file.write(json.dumps([size, state.epoch, state.batch, steps]) + "\n")
        killed = self.folder / "killed"
        due = (state.epoch, state.batch) == (KILLED_IN_EPOCH, KILLED_AT_BATCH)
        if due and hvd.rank() == 0 and not killed.exists():
            killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        if state.epoch == COMES_IN_EPOCH and size == 1:
            (self.folder / "grow").touch()
            end = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < end:
                time.sleep(0.2)
                state.commit()


def main():
    folder = Path(sys.argv[1])
    hvd.init()
    model = make_trained_model()
    hvd.DistributedOptimizer(model.optimizer)
    state = hvd.elastic.KerasState(model, epoch=0, batch=0)
    callbacks = [
        hvd.elastic.CommitStateCallback(state),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.UpdateEpochStateCallback(state),
        Trouble(state, folder),
    ]

    @hvd.elastic.run
    def train(state):
        while state.epoch < EPOCHS:
            rest = make_batches().skip(state.batch)
            model.fit(rest, shuffle=False, verbose=0, callbacks=callbacks)

    train(state)
    found = {"rank": hvd.rank(), "size": hvd.size(), "weights": weights_of(model).tolist()}
    found["steps"] = int(model.optimizer.iterations)
    (folder / f"{os.getpid()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
