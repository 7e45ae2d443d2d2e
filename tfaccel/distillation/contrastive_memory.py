"""What contrastive distillation learns and remembers."""

import math
from typing import Any

import keras

from tfaccel.distillation.feature_math import unit_rows

# Stands for log 0: its exponential is 0, and its gradient is no NaN. Also for no log Z yet.
NEVER = -1e30


@keras.saving.register_keras_serializable("tfaccel")
class ContrastiveHead(keras.layers.Layer):
    """What `ContrastiveRepresentation` learns and remembers.

    Args:
        teacher_width: channels of the teacher's feature.
        student_width: channels of the student's feature.
        dimensions: of the embeddings.
        samples: how many are remembered; None for no memory.
        seed: of the memory and the draws.
    """

    def __init__(
        self,
        teacher_width: int,
        student_width: int,
        dimensions: int,
        samples: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"name": "contrast", "dtype": "float32", **kwargs})
        self.widths = (teacher_width, student_width)
        self.dimensions, self.samples, self.seed = dimensions, samples, seed
        self.teacher_embedding = keras.layers.Dense(dimensions, dtype="float32", name="teacher")
        self.teacher_embedding.build((None, teacher_width))
        self.student_embedding = keras.layers.Dense(dimensions, dtype="float32", name="student")
        self.student_embedding.build((None, student_width))
        if samples is not None:
            self.seeds = keras.random.SeedGenerator(seed)
            self._make_memory(samples)
        self.built = True

    def _make_memory(self, samples: int) -> None:
        self.log_samples = math.log(samples)
        # Of length 1 in the mean, as the embeddings are.
        limit = math.sqrt(3 / self.dimensions)
        self.memories = {}
        self.log_normalizers = {}
        for place, side in enumerate(("teacher", "student")):
            seed = None if self.seed is None else self.seed + place
            self.memories[side] = self.add_weight(
                shape=(samples, self.dimensions),
                initializer=keras.initializers.RandomUniform(-limit, limit, seed=seed),
                trainable=False,
                name=f"{side}_memory",
            )
            # Until the first batch.
            self.log_normalizers[side] = self.add_weight(
                shape=(),
                initializer=keras.initializers.Constant(NEVER),
                trainable=False,
                name=f"{side}_log_normalizer",
            )
        # -1 until the sample is seen.
        self.classes = self.add_weight(
            shape=(samples,),
            dtype="int32",
            initializer=keras.initializers.Constant(-1),
            trainable=False,
            name="classes",
        )

    def embed(self, teacher: Any, student: Any) -> tuple[Any, Any]:
        """Returns the embeddings of both features, [batch, dimensions] of length 1."""
        ops = keras.ops
        embedded = []
        for feature, layer in (
            (teacher, self.teacher_embedding),
            (student, self.student_embedding),
        ):
            positions = tuple(range(1, len(feature.shape) - 1))
            vector = ops.cast(feature, "float32")
            vector = ops.mean(vector, axis=positions) if positions else vector
            embedded.append(unit_rows(layer(vector)))
        return embedded[0], embedded[1]

    def draw(self, count: int) -> Any:
        """Returns the places of `count` samples, drawn uniformly, with repeats."""
        return keras.random.randint((count,), 0, self.samples, seed=self.seeds)

    def are_negatives(self, drawn: Any, index: Any, classes: Any) -> Any:
        """Returns which of the drawn count for which anchor, [batch or 1, drawn] float32."""
        ops = keras.ops
        counts = ops.ones_like(drawn[None, :], dtype="float32")
        if index is not None:
            counts = counts * ops.cast(drawn[None, :] != index[:, None], "float32")
        if classes is not None:
            of_drawn = ops.take(self.classes, drawn, axis=0)[None, :]
            counts = counts * ops.cast(of_drawn != classes[:, None], "float32")
        return counts

    def memory(self, side: str) -> Any:
        """Returns what is remembered of a side, [samples, dimensions]."""
        return _value(self.memories[side])

    def log_normalizer(self, side: str, match: Any, scores: Any, *, fix: bool) -> Any:
        """Returns log Z of a side, of this batch if none before did fix it."""
        ops = keras.ops
        variable = self.log_normalizers[side]
        everything = ops.concatenate([match[:, None], scores], axis=1)
        total = ops.logsumexp(everything)
        numbers = ops.sum(ops.ones_like(everything))
        now = ops.stop_gradient(total - ops.log(numbers) + self.log_samples)
        value = _value(variable)
        value = ops.where(value > NEVER / 2, value, now)
        if fix:
            variable.assign(value)
        return value

    def remember(
        self, teacher: Any, student: Any, index: Any, classes: Any, momentum: float
    ) -> None:
        """Moves the memory of the samples at `index` towards their embeddings."""
        ops = keras.ops
        for side, embedded in (("teacher", teacher), ("student", student)):
            memory = self.memory(side)
            old = ops.take(memory, index, axis=0)
            new = unit_rows(momentum * old + (1 - momentum) * ops.stop_gradient(embedded))
            self.memories[side].assign(ops.scatter_update(memory, index[:, None], new))
        if classes is not None:
            known = ops.scatter_update(_value(self.classes), index[:, None], classes)
            self.classes.assign(known)

    def save_own_variables(self, store: Any) -> None:
        """Saves the weights, and how far the draws are."""
        super().save_own_variables(store)
        if self.samples is not None:
            store["draws"] = keras.ops.convert_to_numpy(self.seeds.state)

    def load_own_variables(self, store: Any) -> None:
        """Restores what `save_own_variables` saved."""
        store = {name: store[name] for name in store.keys()}  # noqa: SIM118
        if self.samples is not None:
            self.seeds.state.assign(store.pop("draws"))
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            **super().get_config(),
            "teacher_width": self.widths[0],
            "student_width": self.widths[1],
            "dimensions": self.dimensions,
            "samples": self.samples,
            "seed": self.seed,
        }


def _value(variable: Any) -> Any:
    """Returns the tensor that a variable holds now."""
    return keras.ops.convert_to_tensor(variable)
