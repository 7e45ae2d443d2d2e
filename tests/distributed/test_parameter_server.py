"""A real cluster: chief, parameter server and two workers, one of which is killed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tfaccel.distributed import ParameterServer

GUIDE = Path(__file__).parents[2] / "docs" / "clusters.md"

KILL = """
import os, signal, keras
class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            os.kill(self.model.cluster.pid("worker", 0), signal.SIGKILL)
"""
TELL = """
import json
x, y = next(iter(make_dataset()))
tell = {"loss": history.history["loss"], "updates": server.updates}
tell["mse"] = float(((server.model(x) - y) ** 2).numpy().mean())
print(json.dumps(tell))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the guide's script tells, with a worker killed as its second epoch begins."""
    folder = tmp_path_factory.mktemp("cluster")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "ParameterServer(" in block]
    code = code.replace("epochs=3", "epochs=3, verbose=0, callbacks=[Kill()]")
    (folder / "train.py").write_text(KILL + code + TELL)
    env = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env["PYTHONPATH"] = str(GUIDE.parents[1])
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


def test_training_goes_on_when_a_worker_is_killed(told):
    steps = 3 * 40
    # A step is made again if its worker died after the update and before it could say so.
    assert steps <= told["updates"] <= steps + 1
    assert len(told["loss"]) == 3
    assert told["loss"][-1] < 0.5 * told["loss"][0]
    assert told["mse"] < 0.5 * told["loss"][0]


def test_what_comes_back_is_a_plain_model(told):
    model = keras.saving.load_model(told["folder"] / "trained.keras")
    assert np.isfinite(model.predict(np.zeros((1, *model.input_shape[1:])), verbose=0)).all()


def test_what_cannot_be_trained_is_said():
    server = ParameterServer()

    def fit(make_model, **changes):
        server.fit(make_model, None, "sgd", "mse", **{"steps_per_epoch": 1, **changes})

    with pytest.raises(ValueError, match="steps_per_epoch must be an int from 1"):
        fit(None, steps_per_epoch=0)
    with pytest.raises(TypeError, match=r"needs a keras\.Model, but got NoneType"):
        fit(lambda: None)
    with pytest.raises(ValueError, match="has no weights yet"):
        fit(lambda: keras.Sequential([keras.layers.Dense(1)]))
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    with pytest.raises(ValueError, match="cannot agree on a scale of the loss"):
        server.fit(None, None, scaled, "mse", steps_per_epoch=1)
