"""One small network learns two tasks from a teacher of each, and from the few labels there are.

A hundred images say which digit they show, a hundred others whether it encloses an area (as 0, 6, 8
and 9 do), all others nothing. The teachers, trained elsewhere, know about all of them. Over the
training, weight goes from the teachers to the labels (BAM, Clark 2019).
"""

import sys

import keras
import numpy as np

from tfaccel.distillation import MultiTaskDistiller, merge_tasks, skip_missing
from tfaccel.recipes import load_data

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
LABELLED = 100  # images for each task

data = load_data("digits")
x, digit = data.train.arrays
digit = digit.astype("int32")  # -1 has to be one of its values


def encloses(digits: np.ndarray) -> np.ndarray:
    """Returns 1 for the digits with a hole, 0 for the others."""
    return np.isin(digits, [0, 6, 8, 9]).astype("int32")


CLASSES = {"digit": data.classes, "hole": 2}


def network(units: int, *heads: str) -> keras.Model:
    """Returns a network that gives logits of each task."""
    inputs = keras.Input(data.input_shape)
    hidden = keras.layers.Flatten()(inputs)
    for _ in range(2):
        hidden = keras.layers.Dense(units, activation="relu")(hidden)
    return keras.Model(inputs, {t: keras.layers.Dense(CLASSES[t], name=t)(hidden) for t in heads})


def compile_for_tasks(model: keras.Model, *heads: str) -> keras.Model:
    """Compiles a network for integer labels, of which some are missing."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), {task: skip_missing(loss) for task in heads})
    return model


def report(name: str, *models: keras.Model) -> None:
    """Prints the accuracy of each task on held-out images."""
    test_x, test_y = data.test.arrays
    said = {}
    for model in models:
        said |= model.predict(test_x, verbose=0)
    truth = {"digit": test_y, "hole": encloses(test_y)}
    found = [f"{task} {np.mean(said[task].argmax(-1) == truth[task]):7.2%}" for task in truth]
    size = sum(model.count_params() for model in models)
    print(f"{name:24} {', '.join(found)} {size:7,} parameters")


keras.utils.set_random_seed(0)
labels = {"digit": digit, "hole": encloses(digit)}
teachers = {task: compile_for_tasks(network(128, task), task) for task in CLASSES}
for task, teacher in teachers.items():
    teacher.fit(x, {task: labels[task]}, batch_size=32, epochs=EPOCHS, verbose=0)
report("two teachers, all labels", *teachers.values())

hole = labels["hole"][LABELLED:].copy()
hole[LABELLED:] = -1  # nobody labelled these
some_x, some_y = merge_tasks(
    {"digit": (x[:LABELLED], digit[:LABELLED]), "hole": (x[LABELLED:], hole)}
)

alone = compile_for_tasks(network(16, *CLASSES), *CLASSES)
first = slice(2 * LABELLED)
few_y = {task: values[first] for task, values in some_y.items()}
alone.fit(some_x[first], few_y, batch_size=32, epochs=5 * EPOCHS, verbose=0)
report(f"student, {2 * LABELLED} labels", alone)

student = network(16, *CLASSES)
steps = EPOCHS * -(-len(some_x) // 32)
distiller = MultiTaskDistiller(teachers, student, annealing_steps=steps, temperature=2.0)
compile_for_tasks(distiller, *CLASSES)
distiller.fit(some_x, some_y, batch_size=32, epochs=EPOCHS, verbose=0)
report("student, two teachers", student)
