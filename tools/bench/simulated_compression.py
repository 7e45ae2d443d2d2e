"""Accuracy of a compressor after many updates: two ranks in one process, with the same messages.

    python tools/bench/simulated_compression.py dgc [--model large] [--epochs 20] [--seed 0]
    python tools/bench/simulated_compression.py dense [--model large] [--epochs 20] [--seed 0]

The training of tools/bench/compressors.py (Fashion-MNIST, batches of 64 a rank, SGD with momentum
0.9, a rate that falls from 0.05 as a cosine, DGC's warm-up four epochs), without namespaces or
Horovod: each rank's gradients go through its own compressor's functions, and the messages are
joined here. The tests hold such a simulation to what ranks of Horovod compute.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
import tensorflow as tf
from compressors import BATCH, MODELS, RATE

import tfaccel.distributed as hvd

RANKS = 2
WARM_UP_EPOCHS = 4


class Joined:
    """A channel whose gather gives the messages of all ranks, which are there already.

    It has no ring: of two ranks the messages are always fewer bytes.
    """

    size = RANKS

    def __init__(self, rank: int, messages: list[Any]) -> None:
        self.rank = rank
        self._messages = messages

    def gather(self, message: Any, key: str) -> Any:  # noqa: ARG002
        """Joins the messages of all ranks."""
        return tf.concat(self._messages, 0)


def train(arm: str, model_name: str, epochs: int, seed: int) -> float:
    """Trains, and returns the accuracy on the test set."""
    (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    x, x_test = (np.reshape(part / 255, (len(part), -1)).astype("float32") for part in (x, x_test))
    keras.utils.set_random_seed(seed)
    widths = MODELS[model_name]
    hidden = [keras.layers.Dense(n, activation="relu") for n in widths[1:-1]]
    model = keras.Sequential([keras.Input((widths[0],)), *hidden, keras.layers.Dense(widths[-1])])
    steps = len(x) // (RANKS * BATCH)
    rate = keras.optimizers.schedules.CosineDecay(RATE, steps * epochs)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9 if arm == "dense" else 0.0)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    compressor = hvd.DGC(0.9, 0.999, warmup_steps=WARM_UP_EPOCHS * steps)
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    states = [
        {name: tf.Variable(value) for name, value in compressor.init(shapes).items()}
        for _ in range(RANKS if arm == "dgc" else 0)
    ]

    def channel(rank: int, messages: list[Any]) -> Any:
        return Joined(rank, messages)

    def exchange(gradients: list[list[Any]]) -> list[Any]:
        payloads, following = [], []
        for own, state in zip(gradients, states, strict=True):
            held = {name: variable.read_value() for name, variable in state.items()}
            payload, after = compressor.compress(own, held, channel(0, []))
            payloads.append(payload)
            following.append(after)
        messages = [payload.parts["message"] for payload in payloads]
        for rank, state in enumerate(states):
            sent = channel(rank, messages)
            done = compressor.communicate(payloads[rank], following[rank], sent)
            for name, value in done.state.items():
                state[name].assign(value)
        return compressor.decompress(done.received)

    @tf.function(autograph=False)
    def step(inputs: Any, labels: Any) -> None:
        gradients = []
        for rank in range(RANKS):
            with tf.GradientTape() as tape:
                value = loss(labels[rank], model(inputs[rank]))
            gradients.append(tape.gradient(value, model.trainable_variables))
        if arm == "dense":
            means = [sum(parts) / RANKS for parts in zip(*gradients, strict=True)]
        else:
            means = exchange(gradients)
        optimizer.apply(means, model.trainable_variables)

    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(x))[: steps * RANKS * BATCH].reshape(steps, RANKS, BATCH)
        for chosen in order:
            step(tf.constant(x[chosen]), tf.constant(y[chosen].astype("int32")))
    return float((model.predict(x_test, 1000, verbose=0).argmax(1) == y_test).mean())


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("arm", choices=["dense", "dgc"])
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    accuracy = train(given.arm, given.model, given.epochs, given.seed)
    seconds = time.perf_counter() - began
    print(f"{given.model} {given.arm}, {given.epochs} epochs: {accuracy:.2%} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
