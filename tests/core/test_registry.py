"""Names, configs and instances."""

import dataclasses

import keras
import pytest

from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry


@keras.saving.register_keras_serializable("tfaccel_tests")
@dataclasses.dataclass(frozen=True)
class Shape(Configurable):
    """Something with a nested part and a tuple."""

    corners: int = 3
    inner: "Shape | None" = None
    sizes: tuple[int, ...] = (1, 2)
    area: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))


SHAPES = Registry("shape", Shape)
SHAPES.register("square")(lambda: Shape(4))
SHAPES.register("triangle")(Shape)


def test_name_config_and_instance_give_the_part():
    square = Shape(4)
    assert SHAPES.get("square") == square
    assert SHAPES.get(square) is square
    assert SHAPES.get(keras.saving.serialize_keras_object(square)) == square
    assert SHAPES.names() == ["square", "triangle"]


def test_a_family_reads_names_of_one_form():
    shapes = Registry("shape", Shape)
    shapes.register("square")(lambda: Shape(4))
    shapes.family("a number of corners, such as '5'")(
        lambda name: Shape(int(name)) if name.isdigit() else None
    )
    assert shapes.get("7") == Shape(7)
    assert shapes.get("square") == Shape(4)
    with pytest.raises(ValueError, match=r"no shape 'x'.*square, a number of corners, such as '5'"):
        shapes.get("x")


def test_what_is_none_of_these_is_an_error():
    with pytest.raises(ValueError, match=r"no shape 'squar'.*square, triangle.*mean 'square'\?"):
        SHAPES.get("squar")
    with pytest.raises(ValueError, match="A shape is a name"):
        SHAPES.get(3)
    with pytest.raises(ValueError, match="is a shape named 'square' already"):
        SHAPES.register("square")


def test_config_of_something_else_is_an_error():
    other = keras.saving.serialize_keras_object(keras.initializers.Zeros())
    for config in (other, {}, {"corners": 3}):
        with pytest.raises(ValueError, match="A shape is a name"):
            SHAPES.get(config)
