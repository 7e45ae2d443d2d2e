"""A small network learns from a large one on images that nobody has labelled.

A hundred images have labels. Trained on those alone, the small network does badly; taught by one
that was trained elsewhere on all of them, it needs no labels at all.
"""

import sys

import keras

from tfaccel.distillation import Distiller
from tfaccel.recipes import load_data

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
LABELLED = 100

data = load_data("digits")
x, y = data.train.arrays


def network(units: int, name: str) -> keras.Model:
    """Returns a network with two hidden layers that gives logits."""
    return keras.Sequential(
        [
            keras.Input(data.input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(data.classes),
        ],
        name=name,
    )


def compile_with_labels(model: keras.Model) -> keras.Model:
    """Compiles a network for integer labels."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def report(name: str, model: keras.Model) -> None:
    """Prints the accuracy on held-out data."""
    found = compile_with_labels(model).evaluate(*data.test.arrays, verbose=0, return_dict=True)
    print(f"{name:32} {found['accuracy']:7.2%} {model.count_params():7,} parameters")


keras.utils.set_random_seed(0)
teacher = compile_with_labels(network(256, "teacher"))
teacher.fit(x, y, batch_size=32, epochs=EPOCHS, verbose=0)
report("teacher, all labels", teacher)

alone = compile_with_labels(network(16, "alone"))
alone.fit(x[:LABELLED], y[:LABELLED], batch_size=32, epochs=10 * EPOCHS, verbose=0)
report(f"student, {LABELLED} labels", alone)

student = network(16, "student")
distiller = Distiller(teacher, student, alpha=0.0, temperature=4.0)
distiller.compile(keras.optimizers.Adam(3e-3))
distiller.fit(x, batch_size=32, epochs=EPOCHS, verbose=0)
report("student, teacher and no labels", student)
