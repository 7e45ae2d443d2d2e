"""Names, patterns and predicates to layers, each with a reason."""

import keras
import pytest
from keras import layers

from tests.contracts.tables import nested, prune
from tfaccel.core.selection import select_layers


def chosen(choices):
    return [choice.layer.name for choice in choices if choice.chosen]


def test_default_is_every_layer_nested_ones_in_their_place():
    choices = select_layers(nested())
    names = chosen(choices)
    assert {"shared", "body_conv", "body_norm", "body_relu", "pool", "logits"} <= set(names)
    assert names.index("shared") < names.index("body_conv") < names.index("pool")
    assert len(names) == len(set(names))
    assert {choice.reason for choice in choices} == {"default"}


def test_names_patterns_and_predicates():
    assert chosen(select_layers(nested(), include="body_*")) == [
        "body_conv",
        "body_norm",
        "body_relu",
    ]
    assert chosen(select_layers(nested(), include=["logits", "shared"])) == ["shared", "logits"]
    by_class = select_layers(nested(), include=lambda x: isinstance(x, layers.Conv2D))
    assert chosen(by_class) == ["shared", "body_conv"]


def test_exclude_wins_and_says_so():
    choices = {c.layer.name: c for c in select_layers(nested(), "body_*", ["body_norm"])}
    assert choices["body_norm"].reason == "excluded"
    assert choices["logits"].reason == "not included"
    assert choices["body_conv"].reason == "included"


def test_inner_layer_of_a_transformed_one_is_what_counts():
    model = prune(nested())
    found = {c.layer.name: c.layer for c in select_layers(model)}
    assert isinstance(found["body_conv"], layers.Conv2D)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_what_matches_nothing_is_an_error(argument):
    with pytest.raises(ValueError, match=f"{argument}='body_con' matches no layer.*'body_conv'"):
        select_layers(nested(), **{argument: "body_con"})
    with pytest.raises(ValueError, match=r"matches no layer.*model\.summary\(\)"):
        select_layers(nested(), **{argument: ["logits", "zzz*"]})
    with pytest.raises(TypeError, match=f"{argument} takes layer names"):
        select_layers(nested(), **{argument: [3]})


def test_name_with_brackets_is_a_name_first():
    x = keras.Input((3,))
    y = layers.Dense(3, name="dense[0]")(layers.Dense(3, name="dense0")(x))
    model = keras.Model(x, y)
    assert chosen(select_layers(model, include="dense[0]")) == ["dense[0]"]
    assert chosen(select_layers(model, exclude=["dense*0]"])) == ["dense0"]


def test_empty_list_selects_nothing_and_any_iterable_will_do():
    assert chosen(select_layers(nested(), include=[])) == []
    assert len(chosen(select_layers(nested(), exclude=()))) == len(select_layers(nested()))
    names = (name for name in ["logits", "pool"])
    assert chosen(select_layers(nested(), include=names)) == ["pool", "logits"]


def test_choices_are_true_or_false_whatever_the_predicate_gives():
    choices = select_layers(nested(), include=lambda layer: layer.weights)
    assert {type(choice.chosen) for choice in choices} == {bool}
    assert "body_relu" not in chosen(choices)


@pytest.mark.parametrize("selector", [3, layers.Conv2D, [layers.Conv2D], b"logits"])
def test_what_is_no_selector_is_an_error(selector):
    with pytest.raises(TypeError, match=r"include takes layer names, .* or a predicate"):
        select_layers(nested(), include=selector)


def test_unbuilt_model_is_refused():
    with pytest.raises(ValueError, match="has no weights yet"):
        select_layers(keras.Sequential([layers.Dense(2)]))


@pytest.mark.parametrize("several", [False, True])
def test_a_layer_is_no_selector_and_the_error_gives_its_name(several):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="d")])
    layer = model.layers[0]
    with pytest.raises(TypeError, match="Give its name: 'd'"):
        select_layers(model, include=[layer] if several else layer)
