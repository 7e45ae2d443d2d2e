"""Config from fields, and back."""

import dataclasses
import json
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.core.configurable import Configurable


@keras.saving.register_keras_serializable("tfaccel_tests")
@dataclasses.dataclass(frozen=True)
class Plan(Configurable):
    """Something with a nested part, a tuple and a field that is computed."""

    steps: int = 3
    inner: "Plan | None" = None
    sizes: tuple[int, ...] = (1, 2)
    options: Any = None
    area: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "area", 2.0 * self.steps)


plans = st.recursive(
    st.none(),
    lambda inner: st.builds(
        Plan,
        steps=st.integers(-5, 5),
        inner=inner,
        sizes=st.lists(st.integers(0, 9), max_size=3),
        options=st.none() | st.booleans() | st.text(max_size=5) | st.dictionaries(st.text(), inner),
    ),
    max_leaves=4,
).filter(lambda plan: plan is not None)


@given(plans)
def test_every_field_survives_json(plan):
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(plan)))
    again = keras.saving.deserialize_keras_object(stored)
    assert again == plan
    assert type(again.sizes) is tuple


def test_config_is_every_field_of_the_constructor_and_no_other():
    plan = Plan(5, Plan(4, None, (7,)), (3, 4, 5))
    assert set(plan.get_config()) == {"steps", "inner", "sizes", "options"}
    assert Plan.from_config(plan.get_config()) == plan
    assert Plan.from_config({"steps": 4}).area == 8.0


def test_arrays_and_keras_objects_are_fields_too():
    plan = Plan(options=[np.arange(3), keras.regularizers.L2(0.5)])
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(plan)))
    array, regularizer = keras.saving.deserialize_keras_object(stored).options
    np.testing.assert_array_equal(array, [0, 1, 2])
    assert regularizer.l2 == 0.5


def test_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="speed"):
        Plan.from_config({"speed": 1})
