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
from tfaccel.distillation import Distiller
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
print("done")
"""


def test_distills_and_resumes_on_jax(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "part.keras")]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "done" in run.stdout
