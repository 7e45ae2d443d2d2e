"""Data sets of several tasks merged, and drawn from in their shares."""

import collections

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.distillation.task_data import TaskBatches, merge_tasks


def numbered(**sizes):
    """Data sets whose inputs are all different and whose labels are those inputs."""
    data, start = {}, 0
    for task, size in sizes.items():
        rows = np.arange(start, start + size, dtype="int64")
        data[task] = (rows[:, None].astype("float32"), rows)
        start += size
    return data


def labelled(y):
    """Which task each sample has a label for; each has one."""
    found = np.stack([labels != -1 for labels in y.values()])
    assert (found.sum(axis=0) == 1).all()
    return np.array(list(y))[found.argmax(axis=0)]


def epoch(batches):
    parts = [batches[i] for i in range(len(batches))]
    rows = np.concatenate([x[:, 0] for x, _ in parts]).astype(int)
    tasks = np.concatenate([labelled(y) for _, y in parts])
    return rows, tasks


def test_merged_data_holds_each_label_where_it_was():
    one_hot = np.eye(3, dtype="float32")[[2, 0]]
    data = {
        "ids": ({"text": np.ones((1, 4), int), "image": np.ones((1, 2))}, np.array([7], "uint8")),
        "hot": ({"text": np.zeros((2, 4), int), "image": np.zeros((2, 2))}, one_hot),
        "flag": ({"text": np.full((1, 4), 2), "image": np.full((1, 2), 3.0)}, [True]),
    }
    x, y = merge_tasks(data)
    assert x["text"].tolist() == [[1] * 4, [0] * 4, [0] * 4, [2] * 4]
    assert x["image"].tolist() == [[1.0] * 2, [0.0] * 2, [0.0] * 2, [3.0] * 2]
    assert y["ids"].tolist() == [7, -1, -1, -1]
    np.testing.assert_array_equal(y["hot"][1:3], one_hot)
    assert np.isnan(y["hot"][[0, 3]]).all()
    assert y["flag"].tolist() == [-1, -1, -1, 1]


def test_gaps_that_were_there_stay():
    _, y = merge_tasks({"a": (np.zeros((2, 1)), [-1, 4]), "b": (np.zeros((1, 1)), [np.nan])})
    assert y["a"].tolist() == [-1, 4, -1]
    assert np.isnan(y["b"]).all()


def test_data_that_does_not_fit_is_refused():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match="data holds no task"):
        merge_tasks({})
    with pytest.raises(ValueError, match=r"\(3,\) in 'a' and \(4,\) in 'b'"):
        merge_tasks({"a": (x, [0, 1]), "b": (np.zeros((2, 4)), [0, 1])})
    with pytest.raises(ValueError, match="'a' needs a label for each of its samples, but got 3"):
        merge_tasks({"a": (x, [0, 1, 2])})
    with pytest.raises(ValueError, match="'a' needs a label"):
        merge_tasks({"a": (x[:0], [])})
    with pytest.raises(TypeError, match="labels of 'a' must be numbers or bool, but are <U3"):
        merge_tasks({"a": (x, ["cat", "dog"])})
    with pytest.raises(ValueError, match="batch_size must be above 0"):
        TaskBatches({"a": (x, [0, 1])}, batch_size=0)
    with pytest.raises(ValueError, match="batches must be above 0"):
        TaskBatches({"a": (x, [0, 1])}, batches=0)
    with pytest.raises(TypeError, match="power must be a number"):
        TaskBatches({"a": (x, [0, 1])}, power="size")


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    power=st.sampled_from([0.0, 0.75, 1.0]),
    batch_size=st.integers(1, 9),
    one_task=st.booleans(),
    seed=st.integers(0, 100),
)
def test_every_task_has_its_share(sizes, power, batch_size, one_task, seed):
    names = [f"task{i}" for i in range(len(sizes))]
    data = numbered(**dict(zip(names, sizes, strict=True)))
    batches = TaskBatches(data, batch_size, power=power, one_task=one_task, seed=seed)
    rows, tasks = epoch(batches)
    unit = batch_size if one_task else 1
    assert len(batches) == -(-sum(sizes) // batch_size)
    assert len(rows) == (len(batches) * batch_size if one_task else sum(sizes))
    weights = np.array(sizes) ** power
    expected = len(rows) / unit * weights / weights.sum()
    found = np.array([(tasks == name).sum() / unit for name in names])
    assert (np.abs(found - expected) < 1 + 1e-6).all()
    for name in names:  # none again before all others
        seen = collections.Counter(rows[tasks == name].tolist())
        counts = [seen[row] for row in data[name][1].tolist()]
        assert max(counts) - min(counts) <= 1
    if one_task:
        for start in range(0, len(rows), batch_size):
            assert len(set(tasks[start : start + batch_size])) == 1


def test_with_power_1_an_epoch_is_every_sample_once():
    rows, _ = epoch(TaskBatches(numbered(a=20, b=5, c=1), 4, power=1.0))
    assert sorted(rows) == list(range(26))


def test_bam_draws_27_to_8_where_sizes_are_81_to_16():
    batches = TaskBatches(numbered(a=81, b=16), 35, power=0.75, batches=2)
    assert len(batches) == 2
    _, tasks = epoch(batches)
    assert collections.Counter(tasks.tolist()) == {"a": 54, "b": 16}


def test_a_tiny_task_gets_its_share_over_the_epochs():
    # One batch in ten epochs: rounded alone it would never come.
    batches = TaskBatches(numbered(a=399, b=1), 40, power=1.0, one_task=True, seed=3)
    found = 0
    for _ in range(400):
        found += (epoch(batches)[1] == "b").sum() // 40
        batches.on_epoch_end()
    assert found == pytest.approx(400 * 10 / 400, abs=9)  # three standard deviations of Poisson


def test_the_seed_decides_and_epochs_differ():
    runs = []
    for seed in (0, 0, 1):
        batches = TaskBatches(numbered(a=20, b=9), 4, seed=seed)
        first = epoch(batches)[0].tolist()
        batches.on_epoch_end()
        runs.append((first, epoch(batches)[0].tolist()))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_fit_takes_them():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    batches = TaskBatches({"only": (np.ones((6, 1)), np.ones((6, 1)))}, 4)
    flat = [(x, y["only"]) for x, y in (batches[i] for i in range(len(batches)))]
    assert [len(x) for x, _ in flat] == [4, 2]
    student = keras.Model(model.inputs, {"only": model.outputs[0]})
    student.compile("sgd", {"only": "mse"})
    assert len(student.fit(batches, epochs=2, verbose=0).history["loss"]) == 2
