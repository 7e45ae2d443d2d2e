"""A loss for one output gets that output's part of everything, and no other."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import log_softmax

from tfaccel.core.configurable import Configurable
from tfaccel.distillation import LogitDistillation
from tfaccel.distillation.for_output import ForOutput, LabelLoss
from tfaccel.distillation.logit_losses import RegressionDistillation
from tfaccel.distillation.missing import skip_missing


@dataclasses.dataclass(frozen=True)
class Recorder(Configurable, keras.distillation.DistillationLoss):
    """Keeps what it was given."""

    head_name: str | None = "shared"
    seen: list = dataclasses.field(default_factory=list)

    def make_head(self, teacher_shape, student_shape):
        self.seen.append((teacher_shape, student_shape))
        return layers.Dense(1)

    def compute_loss(self, teacher_outputs, student_outputs, **options):
        self.seen.append((teacher_outputs, student_outputs, options))
        return keras.ops.zeros(())


@dataclasses.dataclass(frozen=True)
class NeedsLabels(Recorder):
    needs_labels = True


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def heads(units, last=None, name="heads"):
    x = keras.Input((4,))
    outputs = {key: layers.Dense(n, activation=last)(x) for key, n in units.items()}
    return keras.Model(x, outputs, name=name)


@pytest.mark.parametrize("output", ["b", 1])
def test_it_takes_its_part(output):
    def side(kind):
        parts = {"a": f"{kind} a", "b": f"{kind} b"}
        return parts if output == "b" else list(parts.values())

    recorder = Recorder()
    ForOutput(output, recorder).compute_loss(
        side("taught"),
        side("learnt"),
        labels=side("label"),
        sample_weight=side("weight"),
        sample_index="index",
    )
    options = {"labels": "label b", "sample_weight": "weight b", "sample_index": "index"}
    assert recorder.seen == [("taught b", "learnt b", options)]


def test_what_is_for_all_outputs_is_passed_on():
    recorder = Recorder()
    ForOutput("b", recorder).compute_loss("taught", {"b": "learnt"}, labels={"a": 1}, head="head")
    options = {"labels": None, "sample_weight": None, "head": "head"}
    assert recorder.seen == [("taught", "learnt", options)]


def test_heads_are_made_for_the_output():
    recorder = Recorder()
    loss = ForOutput("b", recorder)
    loss.make_head({"a": (None, 1), "b": (None, 2)}, (None, 3))
    ForOutput(1, recorder).make_head(((None, 1), (None, 2)), ((None, 4), (None, 5)))
    assert recorder.seen == [((None, 2), (None, 3)), ((None, 2), (None, 5))]
    assert loss.head_name == "shared"
    without = ForOutput("b", LogitDistillation())
    assert not hasattr(without, "make_head")
    assert without.head_name is None


@pytest.mark.parametrize("column", [False, True])
def test_only_labelled_samples_count(column):
    taught, learnt = numbers(4, 3), numbers(4, 3, seed=1)
    labels, weights = np.array([2, -1, 0, -1]), np.array([1.0, 2.0, 3.0, 4.0])
    p = log_softmax(taught.astype("float64"), axis=-1)
    divergence = (np.exp(p) * (p - log_softmax(learnt.astype("float64"), axis=-1))).sum(axis=-1)
    given = labels[:, None] if column else labels
    every = ForOutput("a", LogitDistillation(1.0)).compute_loss(
        {"a": taught}, {"a": learnt}, labels={"a": given}, sample_weight=weights
    )
    assert float(every) == pytest.approx((divergence * weights).mean(), rel=1e-5)
    some = ForOutput("a", LogitDistillation(1.0), only_labelled=True).compute_loss(
        {"a": taught}, {"a": learnt}, labels={"a": given}, sample_weight=weights
    )
    expected = (divergence[0] * 1 + divergence[2] * 3) / 4
    assert float(some) == pytest.approx(expected, rel=1e-5)


def test_no_gap_gets_into_a_loss_of_labels():
    labels = {"a": np.array([[1.0], [np.nan]], "float32")}
    taught, learnt = {"a": np.zeros((2, 1))}, {"a": np.array([[3.0], [5.0]])}
    loss = RegressionDistillation(bound=0.5)
    found = ForOutput("a", loss, only_labelled=True).compute_loss(taught, learnt, labels=labels)
    assert float(found) == pytest.approx((3 - 1) ** 2 / 2 / 2)
    recorder = NeedsLabels()  # as if only_labelled had been given
    ForOutput("a", recorder).compute_loss(taught, learnt, labels=labels)
    options = recorder.seen[0][2]
    assert np.isfinite(options["labels"]).all()
    assert np.asarray(options["sample_weight"]).tolist() == [1.0, 0.0]


def test_only_its_own_output_has_to_suit_the_loss():
    teacher, student = heads({"a": 3, "b": 1}), heads({"b": 2, "a": 3, "c": 7})
    ForOutput("a", LogitDistillation()).validate_model_compatibility(teacher, student)
    with pytest.raises(ValueError, match=r"same output shapes.*\(None, 1\).*\(None, 2\)"):
        ForOutput("b", RegressionDistillation()).validate_model_compatibility(teacher, student)
    with pytest.raises(ValueError, match="Logits of one class"):
        ForOutput("b", LogitDistillation()).validate_model_compatibility(teacher, student)
    with pytest.raises(ValueError, match="no 'c' among the teacher's outputs: they are 'a', 'b'"):
        ForOutput("c", LogitDistillation()).validate_model_compatibility(teacher, student)
    with pytest.raises(ValueError, match="teacher 'soft' ends in softmax"):
        ForOutput("a", LogitDistillation()).validate_model_compatibility(
            heads({"a": 3}, "softmax", "soft"), student
        )


def test_what_makes_no_sense_is_refused():
    with pytest.raises(TypeError, match="loss must be DistillationLoss"):
        ForOutput("a", keras.losses.MeanSquaredError())
    with pytest.raises(TypeError, match="output must be str or int"):
        ForOutput(None, LogitDistillation())
    feature = keras.distillation.FeatureDistillation(
        loss="mse", teacher_layer_name="deep", student_layer_name="deep"
    )
    with pytest.raises(ValueError, match=r"teacher's layer 'deep'. Give it to the Distiller"):
        ForOutput("a", feature)
    loss = ForOutput("a", LogitDistillation(), only_labelled=True)
    with pytest.raises(ValueError, match=r"only_labelled=True.*needs labels"):
        loss.compute_loss(numbers(2, 3), {"a": numbers(2, 3)}, labels={"b": [1, 2]})
    with pytest.raises(ValueError, match="LabelLoss needs labels"):
        LabelLoss(keras.losses.MeanSquaredError()).compute_loss(None, numbers(2, 3))


def test_it_survives_its_configuration():
    label_loss = LabelLoss(skip_missing(keras.losses.MeanAbsoluteError(reduction="sum")))
    for loss in (
        ForOutput(2, LogitDistillation(7.0), only_labelled=True),
        ForOutput("a", label_loss),
    ):
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
        assert (again.output, again.only_labelled) == (loss.output, loss.only_labelled)
        assert type(again.loss) is type(loss.loss)
    labels, outputs = np.array([[1.0], [np.nan]]), np.array([[3.0], [5.0]])
    assert float(again.compute_loss({}, {"a": outputs}, labels={"a": labels})) == 2.0
    first = ForOutput(2, LogitDistillation(7.0))
    assert ForOutput.from_config(first.get_config()) == first
