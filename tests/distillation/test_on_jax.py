"""Distillation of a pruned student on the JAX backend, in a process of its own."""

import os
import subprocess
import sys

SCRIPT = """
import sys
import keras
import numpy as np
import tfaccel
from tests.distillation.test_distiller import compiled, data, fit, net
from tfaccel.distillation import Distiller, HintLoss, LogitDistillation
from tfaccel.pruning import UpdatePruning, prune

assert keras.backend.backend() == "jax"
teacher = net(32, dropout=0.5)
taught = teacher.get_weights()

def start():
    student = prune(net(8, seed=1), 0.5, include="*")
    return compiled(Distiller(teacher, student, alpha=0.3, temperature=4.0), "adam")

def train(distiller, epochs):
    history = fit(distiller, epochs, validation_data=data(), callbacks=[UpdatePruning()])
    assert np.isfinite(history["val_loss"]).all()
    return distiller

whole, part = train(start(), 3), train(start(), 1)
part.save(sys.argv[1])
resumed = keras.saving.load_model(sys.argv[1])
try:
    train(resumed, 1)
except ValueError as error:
    assert "distiller.teacher" in str(error)
else:
    raise AssertionError("trained without a teacher")
resumed.teacher = teacher
train(resumed, 2)
for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
    np.testing.assert_array_equal(a, b)
for a, b in zip(taught, teacher.get_weights(), strict=True):
    np.testing.assert_array_equal(a, b)
plain = tfaccel.strip(resumed.student)
assert (plain.get_layer("hidden").get_weights()[0] == 0).mean() == 0.5

# Features, projections and a weight by schedule: the student runs once, and its statistics with it.
schedule = keras.optimizers.schedules.PolynomialDecay(0.2, 12, 0.8, power=1.0)
student = net(4, seed=1)
losses = [LogitDistillation(), HintLoss("hidden", "hidden")]
distiller = Distiller(teacher, student, alpha=schedule, losses=losses)
compiled(distiller, keras.optimizers.SGD(0.0))
x, y = data(32)
hidden = np.maximum(x @ student.get_layer("hidden").get_weights()[0], 0)
distiller.train_on_batch(x, y)
mean = np.asarray(student.get_layer("norm").moving_mean)
np.testing.assert_allclose(mean, 0.01 * hidden.mean(axis=0), rtol=1e-4, atol=1e-6)
assert int(distiller.batches_seen) == 1
compiled(distiller, "adam")
before = np.array(distiller.heads[0].kernel)
assert np.isfinite(fit(distiller, 3)["loss"]).all()
assert np.abs(np.array(distiller.heads[0].kernel) - before).max() > 1e-3
print("done")
"""


def test_distills_and_resumes_on_jax(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "part.keras")]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "done" in run.stdout
