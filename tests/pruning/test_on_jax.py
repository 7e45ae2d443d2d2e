"""Pruning on the JAX backend, in a process of its own: Keras has one backend per process."""

import os
import subprocess
import sys

SCRIPT = """
import sys
import keras
import numpy as np
import tfaccel
from tests.pruning.samples import Watch, dense_data, dense_model, zeros_of
from tfaccel.pruning import (
    ConstantSparsity, MobileNetSpace, PolynomialDecay, PruningNet, UpdatePruning, prune, rewind
)

assert keras.backend.backend() == "jax"
schedule = PolynomialDecay(0.0, 0.75, 2, 8, frequency=3)
x, y = dense_data(96)

def start():
    pruned = prune(dense_model(), schedule)
    pruned.compile(keras.optimizers.Adam(0.01), "mse")
    return pruned

def train(model, epochs, *callbacks):
    callbacks = [UpdatePruning(), *callbacks]
    model.fit(x, y, batch_size=24, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model

zeros = []
class Shares(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.jax_state_sync()
        zeros.append(round(256 * zeros_of(self.model)))

whole = train(start(), 3, Shares())
expected = [0, *[round(256 * schedule(step)[1]) for step in (2, 2, 2, 5, 5, 5, 8, 8, 8, 8, 8)]]
assert zeros == expected, zeros

part = train(start(), 1)
part.save(sys.argv[1])
resumed = train(keras.saving.load_model(sys.argv[1]), 2)
for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
    np.testing.assert_array_equal(a, b)
plain = tfaccel.strip(resumed)
assert (plain.get_weights()[0] == 0).mean() == 0.75
np.testing.assert_array_equal(plain.predict(x, verbose=0), resumed.predict(x, verbose=0))

learned = prune(dense_model(), ConstantSparsity(0.5, 4), criterion="movement", pattern="2:4")
learned.compile(keras.optimizers.SGD(0.1), "mse")
train(learned, 2)
assert zeros_of(learned) == 0.5
assert (np.asarray(learned.layers[0].transforms[0][1].state["scores"]) != 0).all()
assert zeros_of(rewind(learned, dense_model())) == 0.5

space = MobileNetSpace((8, 8, 1), classes=2, stem=4, blocks=((8, 2),))
net = PruningNet(space)
images, labels = np.ones((16, 8, 8, 1), "float32"), np.arange(16) % 2
net.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
net.fit(images, labels, verbose=0)
small = net.materialize((4, 4), images)
masked = net(images, training=False, channels=np.array((4, 4)))
np.testing.assert_allclose(small(images), masked, atol=1e-6)
print("done")
"""


def test_prunes_and_resumes_on_jax(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "part.keras")]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "done" in run.stdout
