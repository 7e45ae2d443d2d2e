"""Teach a small network by a large one, and compare with the same network taught by labels."""

import sys

import keras

from tfaccel.distillation import Distiller
from tfaccel.recipes import load_data

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20

data = load_data("digits")
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


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


def fit(model: keras.Model) -> float:
    """Trains a model, or a distiller and its student; returns the accuracy on held-out data."""
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(*data.train.arrays, batch_size=32, epochs=EPOCHS, verbose=0)
    return model.evaluate(*data.test.arrays, verbose=0, return_dict=True)["accuracy"]


keras.utils.set_random_seed(0)
teacher = network(256, "teacher")
print(f"teacher            {fit(teacher):7.2%} {teacher.count_params():8,} parameters")

alone = network(12, "alone")
print(f"student, alone     {fit(alone):7.2%} {alone.count_params():8,} parameters")

student = network(12, "student")
accuracy = fit(Distiller(teacher, student, alpha=0.3, temperature=4.0))
print(f"student, distilled {accuracy:7.2%} {student.count_params():8,} parameters")
