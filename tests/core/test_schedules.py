"""Schedules against TFMOT's own, over all steps."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.core import schedules
from tfaccel.core.schedules import ConstantSparsity, PolynomialDecay

CASES = [
    ("ConstantSparsity", (0.5, 0)),
    ("ConstantSparsity", (0.87, 3, 40, 7)),
    ("ConstantSparsity", (0.1, 5, 5, 1)),
    ("PolynomialDecay", (0.0, 0.8, 0, 200)),
    ("PolynomialDecay", (0.1, 0.83, 7, 213, 3, 10)),
    ("PolynomialDecay", (0.5, 0.2, 1, 100, 2, 9)),
    ("PolynomialDecay", (0.3, 0.9, 20, 220, 0.5, 1)),
]
STEPS = 260

# TFMOT pulls in tf_keras and warns on import: a process of its own keeps that out of this one.
TFMOT = f"""
import sys
import numpy as np
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_schedule
rows = []
for name, arguments in {CASES!r}:
    schedule = getattr(pruning_schedule, name)(*arguments)
    rows.append([[float(x) for x in schedule(step)] for step in range({STEPS})])
np.save(sys.argv[1], np.array(rows))
"""


@pytest.fixture(scope="module")
def tfmot_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfmot") / "rows.npy"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TFMOT, str(path)], check=True, capture_output=True
    )
    return np.load(path)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}{CASES[i][1]}")
def test_equals_tfmot_at_every_step(case, tfmot_rows):
    name, arguments = CASES[case]
    schedule = getattr(schedules, name)(*arguments)
    ours = np.array([schedule(step) for step in range(STEPS)], dtype="float64")
    np.testing.assert_array_equal(ours, tfmot_rows[case])


def test_polynomial_decay_is_the_papers_cubic():
    schedule = PolynomialDecay(0.1, 0.9, 10, 110)
    assert schedule(10)[1] == pytest.approx(0.1)
    assert schedule(60)[1] == pytest.approx(0.9 - 0.8 / 8)
    assert schedule(110)[1] == pytest.approx(0.9)
    assert schedule(0)[1] == pytest.approx(0.1)
    assert schedule(500)[1] == pytest.approx(0.9)


def test_a_span_of_one_step_goes_to_the_end_at_once():
    assert PolynomialDecay(0.0, 0.5, 4, 4)(4) == (True, 0.5)


def test_steps_may_be_numpy_integers():
    schedule = PolynomialDecay(0.0, 0.5, 0, np.ceil(9.5).astype(np.int32))
    assert schedule.end_step == 10
    assert type(schedule.get_config()["end_step"]) is int


schedule_objects = st.one_of(
    st.builds(
        ConstantSparsity,
        st.floats(0, 0.99),
        st.integers(0, 30),
        st.one_of(st.just(-1), st.integers(30, 80)),
        st.integers(1, 20),
    ),
    st.builds(
        PolynomialDecay,
        st.floats(0, 0.99),
        st.floats(0, 0.99),
        st.integers(0, 30),
        st.integers(30, 80),
        st.sampled_from([1, 2, 3, 0.5]),
        st.integers(1, 20),
    ),
)


@given(schedule=schedule_objects, after=st.integers(-1, 100), length=st.integers(0, 60))
def test_due_steps_are_those_of_a_search_step_by_step(schedule, after, length):
    def asked(step):  # not one of ours: can only be asked
        return schedule(step)

    upto = after + length
    assert schedules.last_due(schedule, after, upto) == schedules.last_due(asked, after, upto)
    expected = next((s for s in range(after + 1, 300) if schedule(s)[0]), None)
    assert schedules.next_due(schedule, after) == expected


def test_a_schedule_that_can_only_be_asked_is_asked_again_in_time():
    assert schedules.next_due(lambda step: (step == 7, 0.5), 2) == 7
    assert 2 < schedules.next_due(lambda step: (False, 0.5), 2) < 100_000


@given(schedule=schedule_objects)
def test_round_trips_through_its_config(schedule):
    restored = schedules.get(keras.saving.serialize_keras_object(schedule))
    assert restored == schedule
    assert type(restored) is type(schedule)


def test_get_takes_what_stands_for_a_schedule():
    assert schedules.get(0.8) == ConstantSparsity(0.8, 0)
    assert schedules.get(0) == ConstantSparsity(0.0, 0)
    schedule = PolynomialDecay(0, 0.5, 0, 10)
    assert schedules.get(schedule) is schedule
    for wrong in ("0.5", None, True, PolynomialDecay, [0.5]):
        with pytest.raises(TypeError, match="A schedule is"):
            schedules.get(wrong)


def test_get_takes_a_tfmot_schedule():
    module = "tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule"
    fields = dict(  # noqa: C408
        initial_sparsity=0.1, final_sparsity=0.6, begin_step=2, end_step=9, power=2, frequency=3
    )
    foreign = type("PolynomialDecay", (), {"__module__": module, "__call__": lambda *_: None})()
    vars(foreign).update(fields)
    assert schedules.get(foreign) == PolynomialDecay(0.1, 0.6, 2, 9, 2, 3)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "word"),
    [
        (ConstantSparsity, (1.0, 0), ValueError, "target_sparsity"),
        (ConstantSparsity, ("a", 0), TypeError, "target_sparsity"),
        (ConstantSparsity, (0.5, -1), ValueError, "begin_step"),
        (ConstantSparsity, (0.5, 0.5), TypeError, "begin_step"),
        (ConstantSparsity, (0.5, 10, 9), ValueError, "end_step"),
        (ConstantSparsity, (0.5, 0, -2), ValueError, "end_step"),
        (ConstantSparsity, (0.5, 0, -1, 0), ValueError, "frequency"),
        (PolynomialDecay, (0.0, 0.5, 0, -1), ValueError, "end_step"),
        (PolynomialDecay, (0.0, 0.5, 5, 4), ValueError, "end_step"),
        (PolynomialDecay, (0.0, 1.5, 0, 9), ValueError, "final_sparsity"),
        (PolynomialDecay, (-0.1, 0.5, 0, 9), ValueError, "initial_sparsity"),
        (PolynomialDecay, (0.0, 0.5, 0, 9, 0), ValueError, "power"),
    ],
    ids=str,
)
def test_nonsense_is_refused(kind, arguments, error, word):
    with pytest.raises(error, match=word):
        kind(*arguments)
