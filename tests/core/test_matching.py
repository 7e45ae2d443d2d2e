"""Chains of calls, found by what they are."""

import keras
import pytest
from keras import layers

from tfaccel.core.graph import Graph
from tfaccel.core.matching import match, optional


def small_graph():
    x = keras.Input((8, 8, 3), name="in")
    y = layers.Conv2D(4, 3, name="conv_1")(x)
    y = layers.ReLU(name="relu_1")(layers.BatchNormalization(name="norm_1")(y))
    z = layers.Conv2D(4, 3, padding="same", name="conv_2")(y)
    z = layers.ReLU(name="relu_2")(z)
    return Graph.read(keras.Model(x, layers.Add(name="sum")([y, z]), name="small"))


def names(chain):
    return [node.name if node else None for node in chain]


def test_match_finds_chains_with_optional_steps():
    found = match(
        small_graph(), [layers.Conv2D, optional(layers.BatchNormalization), optional(layers.ReLU)]
    )
    assert [names(c) for c in found] == [
        ["conv_1", "norm_1", "relu_1"],
        ["conv_2", None, "relu_2"],
    ]


def test_match_stops_where_a_value_is_read_twice_or_given_out():
    x = keras.Input((3,))
    y = layers.Dense(3, name="d")(x)
    z = layers.ReLU(name="r")(y)
    twice = Graph.read(keras.Model(x, layers.Add()([y, z])))
    given_out = Graph.read(keras.Model(x, [y, z]))
    for graph in (twice, given_out):
        assert match(graph, [layers.Dense, layers.ReLU]) == []


def test_match_takes_predicates_and_types_and_does_not_overlap():
    x = keras.Input((3,))
    y = x
    for number in range(5):
        y = layers.ReLU(name=f"r{number}")(y)
    graph = Graph.read(keras.Model(x, y))
    pairs = match(graph, [(layers.ReLU, layers.Dense), lambda node: node.name != "r9"])
    assert [names(c) for c in pairs] == [["r0", "r1"], ["r2", "r3"]]


def test_step_may_be_missing_where_it_would_fit_if_a_later_one_needs_its_node():
    x = keras.Input((3,))
    y = layers.ReLU(name="r")(layers.Dense(3, name="d")(x))
    graph = Graph.read(keras.Model(x, y))
    found = match(graph, [layers.Dense, optional(layers.ReLU), layers.ReLU])
    assert [names(c) for c in found] == [["d", None, "r"]]
    assert match(graph, [layers.Dense, layers.ReLU, layers.ReLU]) == []


def test_chain_may_end_in_an_output_but_not_go_through_one():
    x = keras.Input((3,))
    y = layers.Dense(3, name="d")(x)
    graph = Graph.read(keras.Model(x, [y, layers.ReLU(name="r")(y)]))
    found = match(graph, [layers.Dense, optional(layers.ReLU)])
    assert [names(c) for c in found] == [["d", None]]


def test_wrong_patterns_are_errors():
    graph = small_graph()
    for pattern in ([], [optional(layers.ReLU)]):
        with pytest.raises(ValueError, match="A pattern begins with a step"):
            match(graph, pattern)
    for pattern in (["Conv2D"], [layers.Conv2D, optional(3)]):
        with pytest.raises(TypeError, match="A step is a class, several, or a predicate, but got"):
            match(graph, pattern)
