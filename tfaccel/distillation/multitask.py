"""One student of several tasks, taught by a teacher of each."""

from collections.abc import Mapping
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_model, check_positive, check_type
from tfaccel.distillation.arguments import Weight
from tfaccel.distillation.batches import StoredTeacher
from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.extraction import FINAL
from tfaccel.distillation.for_output import ForOutput, LabelLoss
from tfaccel.distillation.losses import LogitDistillation

Task = str | tuple[str, ...]


def join_teachers(teachers: Mapping[Task, keras.Model], *, name: str = "teachers") -> keras.Model:
    """Returns the teachers of several tasks as one model, whose outputs are a dict by task.

    The teachers share its inputs. It shares their layers, copies no weights and changes nothing
    about them. An `ensemble` is a teacher as any other.

    Args:
        teachers: for each task a built Functional or Sequential model with one output, or with a
            dict of outputs of which one has the task's name. For a tuple of tasks, a model that has
            an output for each, in a dict by their names or in their order.
        name: of the model.

    Returns:
        A Functional model.

    Raises:
        TypeError: a teacher is no Functional or Sequential model.
        ValueError: there is none, a task has two, one has other outputs than its tasks need, or the
            inputs of two differ.

    >>> def net(units):
    ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)], name="net")
    >>> join_teachers({"color": net(3), "shape": net(2)}).output["shape"].shape
    (None, 2)
    """
    check_type("teachers", teachers, Mapping)
    if not teachers:
        raise ValueError("join_teachers() needs a teacher for some task, but got none.")
    for teacher in teachers.values():
        check_model(teacher, "join_teachers")
    first = next(iter(teachers.values()))
    inputs = keras.tree.map_structure(
        lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name),
        keras_private.functional_of(first).input,
    )
    outputs: dict[str, Any] = {}
    for tasks, teacher in teachers.items():
        _check_same_inputs(first, teacher)
        said = _of_tasks(tasks, teacher)
        twice = sorted(set(said) & set(outputs))
        if twice:
            raise ValueError(
                f"A task has one teacher, but {', '.join(map(repr, twice))} got two. "
                "Make them one first: ensemble([teacher, other])."
            )
        # Teachers may bear the same name; a model of the same layers can have another.
        view = keras.Model(
            keras_private.functional_of(teacher).input,
            said,
            name="_".join([*said, "teacher"]).replace("/", "_"),
        )
        outputs |= view(inputs)
    return keras.Model(inputs, outputs, name=name)


def _of_tasks(tasks: Task, teacher: keras.Model) -> dict[str, Any]:
    """Returns a teacher's output tensors by task."""
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    output = keras_private.functional_of(teacher).output
    if isinstance(output, Mapping) and set(names) <= set(output):
        return {task: output[task] for task in names}
    tensors = keras.tree.flatten(output)
    if len(tensors) != len(names) or (isinstance(output, Mapping) and len(names) > 1):
        has = list(output) if isinstance(output, Mapping) else len(tensors)
        raise ValueError(
            f"The teacher {teacher.name!r} of {tasks!r} needs an output for each of these tasks, "
            f"but has {has}. Name those that it has: {{('color', 'shape'): teacher}}."
        )
    return dict(zip(names, tensors, strict=True))


def _check_same_inputs(first: keras.Model, other: keras.Model) -> None:
    described = [
        keras.tree.map_structure(
            lambda tensor: f"{tuple(tensor.shape[1:])} {tensor.dtype}",
            keras_private.functional_of(model).input,
        )
        for model in (first, other)
    ]
    if described[0] != described[1]:
        raise ValueError(
            f"The teachers of one student share its inputs, but {first.name!r} takes "
            f"{described[0]} and {other.name!r} takes {described[1]}. Adapt one of them with a "
            "model of its own around it."
        )


@keras.saving.register_keras_serializable("tfaccel")
class MultiTaskDistiller(Distiller):
    """Trains a student of several tasks on their labels and on a teacher of each.

    loss = alpha · Σ (the student's own loss) + (1 - alpha) · Σ (distillation loss), over the tasks

    A `Distiller` of `join_teachers(teachers)` with a `ForOutput` loss for each task. MT-DNN (Liu
    2019) averages labels and soft labels: alpha=0.5, temperature=1. BAM (Clark 2019) goes from the
    teachers to the labels, target = λ · label + (1 - λ) · teacher, with λ from 0 to 1 in equal
    steps: temperature=1 and annealing_steps=(batches of the whole training). Cross-entropy is
    linear in the target, so that λ is alpha.

    Labels may be missing for a sample, -1 or NaN, if the losses given to `compile` are those of
    `skip_missing`; it learns from that task's teacher still. `merge_tasks` and `TaskBatches` make
    such labels of data sets for one task each.

    Args:
        teachers: by task, as for `join_teachers`; or what that returned, or its `TeacherCache`.
        student: a built model with a dict of outputs by task.
        alpha: weight of labels, a number in [0, 1] or a schedule; 0.5 if neither this nor
            annealing_steps is given.
        annealing_steps: batches in which alpha goes from 0 to 1.
        temperature: of the default loss, `LogitDistillation`; 3 if not given.
        losses: by task a distillation loss other than the default; for a task without a teacher
            its Keras loss, with which its labels count in full whatever alpha is.
        loss_weights: by task the weight of the distillation loss, 1 by default. Weights of the
            student's own losses go to `compile`.
        only_labelled: whether a task's teacher is heard on samples with that task's label alone,
            as where each batch is of one task.
        name: of the model.
        options: others of `Distiller`.

    Raises:
        TypeError: a model, loss or weight is of another kind.
        ValueError: teachers and student do not fit, a task has neither a teacher nor a loss, or an
            argument makes no sense.

    Example:
        >>> def net(**units):
        ...     x = keras.Input((4,))
        ...     return keras.Model(x, {k: keras.layers.Dense(n)(x) for k, n in units.items()})
        >>> teachers = {"color": net(color=3), "shape": net(shape=2)}
        >>> student = net(color=3, shape=2)
        >>> distiller = MultiTaskDistiller(teachers, student, temperature=1.0, annealing_steps=100)
        >>> [loss.output for loss in distiller.distillation_losses]
        ['color', 'shape']
    """

    def __init__(
        self,
        teachers: Mapping[Task, keras.Model] | keras.Model | StoredTeacher | None,
        student: keras.Model,
        *,
        alpha: Weight | None = None,
        annealing_steps: int | None = None,
        temperature: float | None = None,
        losses: Any = None,
        loss_weights: Any = None,
        only_labelled: bool = False,
        name: str = "multi_task_distiller",
        **options: Any,
    ) -> None:
        if annealing_steps is not None:
            if alpha is not None:
                raise ValueError(
                    f"annealing_steps={annealing_steps!r} makes a schedule of alpha, but "
                    f"alpha={alpha!r} was given too. Leave out one of the two."
                )
            check_positive("annealing_steps", annealing_steps)
            alpha = keras.optimizers.schedules.PolynomialDecay(0.0, annealing_steps, 1.0)
        teacher = join_teachers(teachers) if isinstance(teachers, Mapping) else teachers
        if teacher is not None:  # else it comes from a file, losses and weights in their final form
            tasks = _tasks_of(teacher, student)
            losses = _losses_by_task(tasks, losses, temperature, only_labelled)
            loss_weights = _in_order(tasks, "loss_weights", loss_weights, 1.0)
        super().__init__(
            teacher,
            student,
            alpha=0.5 if alpha is None else alpha,
            losses=losses,
            loss_weights=loss_weights,
            name=name,
            **options,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher" and isinstance(value, Mapping):
            value = join_teachers(value)
        super().__setattr__(name, value)


def _tasks_of(teacher: keras.Model | StoredTeacher, student: keras.Model) -> dict[str, bool]:
    """Returns for each task of the student whether it has a teacher."""
    check_type("student", student, keras.Model)
    sides = []
    for role, model in (("teacher", teacher), ("student", student)):
        if isinstance(model, keras.Model):
            check_model(model, "MultiTaskDistiller")
            outputs = keras_private.functional_of(model).output
        else:
            check_type("teachers", model, (Mapping, keras.Model, StoredTeacher))
            outputs = model.output_shapes[FINAL]
        if not isinstance(outputs, Mapping):
            raise ValueError(  # noqa: TRY004
                f"The {role} {model.name!r} needs a dict of outputs by task. Make one: "
                "keras.Model(inputs, {'color': color_logits, 'shape': shape_logits})."
            )
        sides.append(list(outputs))
    taught, learnt = sides
    strangers = [task for task in taught if task not in learnt]
    if strangers:
        raise ValueError(
            f"There are teachers of {', '.join(map(repr, strangers))}, but the student "
            f"{student.name!r} has the outputs {', '.join(map(repr, learnt))}. Leave those "
            "teachers out, or give the student an output for each."
        )
    return {task: task in taught for task in learnt}


def _losses_by_task(
    tasks: Mapping[str, bool], losses: Any, temperature: float | None, only_labelled: bool
) -> list[ForOutput]:
    default = LogitDistillation() if temperature is None else LogitDistillation(temperature)
    given = _in_order(tasks, "losses", losses, None)
    if temperature is not None and None not in given:
        raise ValueError(
            f"temperature={temperature} is for the default loss, but each task has a loss of its "
            "own. Give the temperature to the losses themselves."
        )
    made = []
    for (task, has_teacher), loss in zip(tasks.items(), given, strict=True):
        if has_teacher:
            made.append(ForOutput(task, default if loss is None else loss, only_labelled))
        elif isinstance(loss, keras.losses.Loss):
            made.append(ForOutput(task, LabelLoss(loss)))
        else:
            raise ValueError(
                f"The student's task {task!r} has no teacher. Give one, or the Keras loss by "
                f"which it learns from its labels: losses={{{task!r}: keras.losses....}}."
            )
    return made


def _in_order(tasks: Mapping[str, bool], name: str, given: Any, default: Any) -> list[Any]:
    """Returns what is given by task, in the order of the tasks."""
    given = {} if given is None else given
    check_type(name, given, Mapping)
    strangers = [task for task in given if task not in tasks]
    if strangers:
        raise ValueError(
            f"{name} has {', '.join(map(repr, strangers))}, but the tasks are "
            f"{', '.join(map(repr, tasks))}."
        )
    return [given.get(task, default) for task in tasks]
