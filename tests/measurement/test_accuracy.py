import numpy as np
import pytest

from tfaccel.measurement import measure_accuracy

# Argmax: 1, 0, 2, 2.
OUTPUTS = np.array([[0, 3, 1], [5, 1, 1], [0, 1, 2], [0, 0, 1]], "float32")
INDEX = np.arange(4)  # the samples are the rows' numbers


def predict(x):
    return OUTPUTS[x]


@pytest.mark.parametrize(
    "labels",
    [
        np.array([1, 0, 0, 2]),
        np.array([[1], [0], [0], [2]], "uint8"),
        np.array([1.0, 0.0, 0.0, 2.0]),
        np.eye(3)[[1, 0, 0, 2]],
        [1, 0, 0, 2],
    ],
    ids=["integers", "column", "floats", "one-hot", "list"],
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_three_of_four_are_right(labels, batch_size):
    assert measure_accuracy(predict, (INDEX, labels), batch_size=batch_size) == (0.75, 4)


def test_batches_of_tf_data():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((INDEX, [1, 0, 0, 2])).batch(3)
    assert measure_accuracy(predict, data) == (0.75, 4)


def test_several_inputs_are_handed_over_together():
    def predict_both(inputs):
        left, right = inputs
        return OUTPUTS[left + right]

    assert measure_accuracy(predict_both, ([INDEX, 0 * INDEX], [1, 0, 0, 2])) == (0.75, 4)
    named = [({"left": INDEX, "right": 0 * INDEX}, np.array([1, 0, 0, 2]))]
    assert measure_accuracy(lambda x: OUTPUTS[x["left"] + x["right"]], named) == (0.75, 4)


@pytest.mark.parametrize("data", [(INDEX[:0], np.array([])), [], iter(())])
def test_an_empty_data_set_is_refused(data):
    with pytest.raises(ValueError, match="data set is empty"):
        measure_accuracy(predict, data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 2)), r"integers \[4\] or one-hot \[4, 3\].*got \[4, 2\]"),
        (np.zeros((4, 3, 1)), r"got \[4, 3, 1\]"),
        (np.array([0, 1, 2, 3]), "from 0 to 2"),
        (np.array([0, 1, 2, -1]), "from 0 to 2"),
        (np.array([0, 1, 2, 0.5]), "integers from 0 to 2"),
        (np.array([0, 1]), "as many samples, but got 4 and 2"),
    ],
)
def test_labels_of_the_wrong_shape_or_range_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        measure_accuracy(predict, (INDEX, labels))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2)])
def test_outputs_that_are_no_classes_are_refused(shape):
    with pytest.raises(ValueError, match="two classes at least"):
        measure_accuracy(lambda _: np.zeros(shape), (INDEX, INDEX))


@pytest.mark.parametrize("data", [INDEX, "digits", {"x": INDEX}, 5])
def test_data_of_another_kind_are_refused(data):
    with pytest.raises(TypeError, match=r"\(x, y\) arrays"):
        measure_accuracy(predict, data)


def test_batches_without_labels_are_refused():
    with pytest.raises(TypeError, match="Labels are needed"):
        measure_accuracy(predict, [INDEX])
