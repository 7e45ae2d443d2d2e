import json
import subprocess
import sys

import keras
import numpy as np
import pytest

import tfaccel.distributed as hvd
from tests.distributed.optimizer_scenarios import optimizer_names
from tests.distributed.worker import OPTIMIZERS

# A process in which neither of ours can be imported.
PLAIN_PROCESS = """
import sys
sys.modules["tfaccel"] = sys.modules["horovod"] = None
import json, pathlib, keras, numpy as np
folder = pathlib.Path(sys.argv[1])
model = keras.saving.load_model(folder / "model.keras")
scaled = keras.saving.load_model(folder / "scaled.keras")
x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
outputs = model.predict(x, verbose=0)
before = int(model.optimizer.iterations)
model.fit(x, np.zeros((32, 3)), 8, verbose=0)
json.dump({
    "outputs": outputs.tolist(), "before": before, "after": int(model.optimizer.iterations),
    "classes": [str(type(o)) for o in (model.optimizer, scaled.optimizer)],
    "accumulation": model.optimizer.gradient_accumulation_steps,
}, (folder / "plain.json").open("w"))
"""


def test_with_one_worker_nothing_is_changed():
    optimizer = keras.optimizers.Adam(0.01)
    before = dict(vars(optimizer))
    assert hvd.DistributedOptimizer(optimizer) is optimizer
    assert vars(optimizer) == before


def test_backward_passes_become_keras_accumulation():
    plain = hvd.DistributedOptimizer(keras.optimizers.SGD(), backward_passes_per_step=3)
    assert plain.gradient_accumulation_steps == 3
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    hvd.DistributedOptimizer(scaled, backward_passes_per_step=3)
    assert scaled.inner_optimizer.gradient_accumulation_steps == 3
    own = keras.optimizers.SGD(gradient_accumulation_steps=4)
    assert hvd.DistributedOptimizer(own).gradient_accumulation_steps == 4
    assert hvd.DistributedOptimizer(own, backward_passes_per_step=4) is own


def built():
    optimizer = keras.optimizers.SGD()
    optimizer.build([keras.Variable(0.0)])
    return optimizer


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (lambda: "adam", {}, TypeError, "optimizer must be Optimizer, but got 'adam'"),
        (keras.optimizers.SGD, {"compression": 16}, ValueError, "compression must be one of"),
        (keras.optimizers.SGD, {"groups": 0}, ValueError, "a number from 1 or lists"),
        (
            keras.optimizers.SGD,
            {"gradient_predivide_factor": 2.0, "op": hvd.Sum},
            ValueError,
            "divides an average, but op is Sum",
        ),
        (keras.optimizers.SGD, {"op": hvd.Max}, ValueError, "Average or Sum for gradients"),
        (keras.optimizers.SGD, {"op": "mean"}, ValueError, "but got 'mean'"),
        (keras.optimizers.SGD, {"backward_passes_per_step": 0}, ValueError, "from 1, but got 0"),
        (built, {"backward_passes_per_step": 2}, ValueError, "is built already"),
        (
            lambda: keras.optimizers.SGD(gradient_accumulation_steps=4),
            {"backward_passes_per_step": 2},
            ValueError,
            "contradicts gradient_accumulation_steps=4",
        ),
    ],
)
def test_wrong_arguments_are_named(make, options, kind, message):
    with pytest.raises(kind, match=message):
        hvd.DistributedOptimizer(make(), **options)


@pytest.mark.horovod
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_workers_equal_one_with_the_double_batch(job, name):
    for found in job["equality"]:
        assert found[name]["error"] <= 1e-6
        assert found[name]["moved"] > 1e-3


@pytest.mark.horovod
@pytest.mark.parametrize("name", [*optimizer_names(), "MultiOptimizer", "LossScaleOptimizer"])
def test_every_optimizer_of_keras_trains_as_in_one_process(job, name):
    for found in job["every_optimizer"]:
        assert found[name]["error"] <= 1e-6
        assert found[name]["moved"] > 1e-3


@pytest.mark.horovod
def test_horovods_arguments_do_what_they_say(job):
    for found in job["options"]:
        for name in (
            "sum",
            "backward passes",
            "predivided",
            "groups",
            "num_groups",
            "name",
            "summed passes",
        ):
            assert found[name] <= 1e-6, name
        # Rounded to 11 and 8 bits; what comes of it stays small, and is there.
        assert 1e-7 < found["fp16"] < 1e-3
        assert found["fp16"] < found["bf16"] < 1e-2
        # Another rule: more than the mean of two gradients, less than their sum.
        assert found["adasum"] > 1e-3
        # Of a set that this rank is no member of: trained on half of the data.
        assert found["alone"] > 1e-3


@pytest.mark.horovod
def test_local_layers_stay_as_they_are_on_each_rank(job):
    first, second = job["local_layers"]
    for found in (first, second):
        assert max(found["errors"]) <= 1e-6
    assert first["shared"] == second["shared"]
    assert np.abs(np.array(first["own"]) - second["own"]).max() > 1e-2


@pytest.mark.horovod
def test_batches_are_normalized_by_the_statistics_of_all_ranks(job):
    first, second = job["batch_norm"]
    for found in (first, second):
        # Weights of up to 100 (the moving means), each to the last digits of a float32.
        assert found["error"] <= 100 * 2.0**-22
        assert found["moved"] > 1.0
        # 1 and 3 of rank 0, and 11 of rank 1.
        np.testing.assert_allclose(found["masked"], [5.0, 56 / 3], rtol=1e-5)
    assert first == second


def test_models_to_synchronize_have_something_to_normalize():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
    assert hvd.synchronize_batch_norm(model) is model
    with pytest.raises(ValueError, match="no BatchNormalization to synchronize"):
        hvd.synchronize_batch_norm(keras.Sequential([keras.Input((2,))]))
    with pytest.raises(ValueError, match="leave fused=False"):
        hvd.SyncBatchNormalization(fused=True)


@pytest.mark.horovod
def test_gradient_tapes_combine_gradients(job):
    for rank, found in enumerate(job["tapes"]):
        # The mean of 1 and 2, and this rank's own, divided by two.
        assert found["partial"] == [1.5, (1 + rank) / 2]
        assert found["error"] <= 1e-6
        assert found["kinds"] == ["IndexedSlices", "None"]
        # Rows 0 and 3 of rank 0, 1 and 3 of rank 1: their mean.
        assert found["sparse"] == found["dense"] == [[1, 1], [1, 1], [0, 0], [2, 2]]
        assert found["persistent"] == [1.5, 1.5]


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("narrower", "number 1 of 5 on rank 0 is sequential"),
        ("narrower", "hidden/kernel (float32 (6, 8) of float32 (6, 8)), and of 5 on rank 1"),
        (
            "other_type",
            "is scale (float32 (1,) of float32 (1,)), and of 2 on rank 1 scale (float64",
        ),
        (
            "other_kind",
            "table (float32 (2, 1) of float32 (2, 1)), and of 2 on rank 1 table (sparse",
        ),
        (
            "other_op",
            "how gradients are exchanged (op=Average, compression=none, named tfaccel_opt",
        ),
        ("other_order", "compression=none, named one.0), and of 2 on rank 1 how gradients are"),
    ],
)
def test_unlike_gradients_are_named_before_the_first_exchange(job, case, words):
    for found in job["unlike_models"]:
        assert "The ranks differ in the gradients to exchange: number" in found[case][1]
        assert words in found[case][1]


@pytest.mark.horovod
def test_several_steps_at_once_and_loops_equal_one_process(job):
    for found in job["several_steps"]:
        assert found["error"] <= 1e-6
    for found in job["custom_loops"]:
        assert found["eager"] <= 1e-6
        assert found["compiled"] <= 1e-6


@pytest.mark.horovod
def test_a_distiller_with_a_projection_trains_as_in_one_process(job):
    for found in job["distillation"]:
        assert found["error"] <= 1e-6
        assert found["moved"] > 1e-3


@pytest.mark.horovod
def test_sparse_gradients_are_gathered(job):
    for found in job["sparse"]:
        assert "IndexedSlices" in found["kinds"]
        assert found["error"] <= 1e-6
        assert found["moved"] > 1e-3


@pytest.mark.horovod
def test_mixed_precision_trains_as_one_process_does(job):
    # The forward pass rounds to 8 and 11 bits; sums over another batch size round otherwise.
    for found in job["mixed_precision"]:
        for policy, bits in (("mixed_bfloat16", 8), ("mixed_float16", 11)):
            assert found[policy]["error"] <= 2 * 2.0**-bits * found[policy]["moved"]


@pytest.mark.horovod
@pytest.mark.parametrize("way", ["compile wraps it", "wrapped before", "wrapped after"])
def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(job, way):
    first, second = (found[way] for found in job["overflow_on_one_rank"])
    assert first == second
    assert first["class"] == "LossScaleOptimizer"
    assert first["updates"] == 3  # of 4 steps
    assert first["scale"] == 0.5
    assert np.isfinite(first["weights"]).all()


@pytest.mark.horovod
def test_variables_of_16_bits_stay_the_same_on_all_ranks(job):
    first, second = job["half_variables"]
    assert first == second
    assert np.isfinite(first["bfloat16"] + first["float16"]).all()


@pytest.mark.horovod
@pytest.mark.parametrize("way", ["fit", "several steps", "eagerly"])
def test_weights_that_begin_different_are_an_error_on_all_ranks(job, way):
    for kind, words in (found[way] for found in job["drift"]):
        assert kind in ("UnknownError", "RuntimeError")
        assert "After 1 update the weights of the ranks differ: " in words
        assert "/hidden/kernel and 1 more (of 4)" in words
        assert "BroadcastGlobalVariablesCallback(0)" in words


@pytest.mark.horovod
def test_weights_that_part_later_are_an_error_on_all_ranks(job):
    for _, words in job["late_drift"]:
        assert "After 10 updates the weights of the ranks differ: " in words
        assert "/out/bias (of 4)" in words or "/out/bias and" in words or "and 3 more" in words


@pytest.mark.horovod
def test_xla_is_refused_with_what_to_do(job):
    for kind, words in job["compiled_by_xla"]:
        assert kind == "RuntimeError"
        assert "jit_compile=False" in words


@pytest.mark.horovod
def test_saved_model_is_plain_keras(job):
    command = [sys.executable, "-c", PLAIN_PROCESS, str(job.folder)]
    subprocess.run(command, check=True, timeout=120, capture_output=True, cwd=job.folder)
    found = json.loads((job.folder / "plain.json").read_text())
    saved, _ = job["save"]
    np.testing.assert_allclose(found["outputs"], saved["outputs"], rtol=0, atol=1e-6)
    assert found["classes"][0] == "<class 'keras.src.optimizers.adamw.AdamW'>"
    # Keras stores what compile() was given; it puts the LossScaleOptimizer around it again itself.
    assert found["classes"][1] == "<class 'keras.src.optimizers.sgd.SGD'>"
    assert found["accumulation"] == 2
    # 4 batches before, 4 since, 2 of them an update
    assert (saved["updates"], found["before"], found["after"]) == (2, 2, 4)


@pytest.mark.horovod
def test_training_goes_on_from_a_saved_model(job):
    first, second = job["resume"]
    assert first == second
    assert (first["before"], first["after"]) == (2, 4)


def test_loading_needs_an_optimizer(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.save(tmp_path / "bare.keras")
    with pytest.raises(ValueError, match="was not compiled"):
        hvd.load_model(tmp_path / "bare.keras")

    class Slow(keras.optimizers.SGD):
        pass

    model.compile(Slow(0.5), "mse")
    model.save(tmp_path / "model.keras")
    loaded = hvd.load_model(tmp_path / "model.keras", custom_optimizers=[Slow])
    assert type(loaded.optimizer) is Slow
    assert float(loaded.optimizer.learning_rate) == 0.5
