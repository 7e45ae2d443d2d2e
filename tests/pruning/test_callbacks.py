"""UpdatePruning: the right mask at the right step, however the steps are run."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.pruning.samples import Watch, dense_data, dense_model, masks_of, zeros_of
from tfaccel.pruning import ConstantSparsity, PolynomialDecay, UpdatePruning, prune, update_masks

BATCHES = 12


def train(pruned, epochs=1, batches=BATCHES, watch=None, **options):
    if not pruned.compiled:
        pruned.compile("sgd", "mse", **options)
    callbacks = [UpdatePruning()] if watch is None else [UpdatePruning(), watch]
    x, y = dense_data(8 * batches)
    pruned.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return pruned


@pytest.mark.parametrize("jit", [False, True])
def test_masks_move_at_the_schedules_turns_only(jit):
    schedule = PolynomialDecay(0.0, 0.75, 2, 8, frequency=3)
    watch = Watch()
    train(prune(dense_model(), schedule), watch=watch, jit_compile=jit)
    shares = [schedule(step)[1] for step in (2, 5, 8)]
    counts = [round(256 * z) for z in watch.zeros]
    expected = [0, *[round(256 * s) for s in np.repeat(shares, 3)]]
    assert counts[:10] == expected
    assert counts[10:] == [192, 192]


def test_a_schedule_from_step_0_prunes_before_the_first_update():
    watch = Watch()
    model = dense_model()
    initial = np.abs(model.get_weights()[0])
    train(prune(model, 0.5), batches=2, watch=watch)
    kept = watch.masks[0][:192].reshape(12, 16)
    assert kept.mean() == 0.5
    assert initial[kept].min() > initial[~kept].max()


@pytest.mark.parametrize("steps", [2, 4, 5])
@pytest.mark.parametrize("turn", [1, 3, 7, 12])
def test_no_turn_inside_an_execution_of_several_steps_is_lost(steps, turn):
    pruned = prune(dense_model(), ConstantSparsity(0.5, turn, turn))
    watch = Watch()
    train(pruned, watch=watch, steps_per_execution=steps)
    # Watch runs after UpdatePruning: the first execution that reaches the turn has it.
    done = np.minimum(np.arange(steps, BATCHES + steps, steps), BATCHES)
    in_force = [0.5 if end >= turn else 0.0 for end in done]
    assert watch.zeros == in_force
    assert [t.last_step for layer in pruned.layers for _, t in layer.transforms] == [turn, turn]


def test_accumulated_batches_are_no_steps():
    pruned = prune(dense_model(), ConstantSparsity(0.5, 3, frequency=50))
    pruned.compile(keras.optimizers.SGD(0.01, gradient_accumulation_steps=4), "mse")
    watch = Watch()
    train(pruned, watch=watch)
    assert watch.zeros == [0.0] * 8 + [0.5] * 4  # the third update begins with the ninth batch


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("cut", [1, 2])
def test_saved_in_mid_training_it_goes_on_as_if_not_stopped(jit, cut, tmp_path):
    def start():
        pruned = prune(dense_model(), PolynomialDecay(0.1, 0.8, 1, 30, frequency=4))
        pruned.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit)
        return pruned

    whole = train(start(), epochs=3)
    part = train(start(), epochs=cut)
    part.save(tmp_path / "part.keras")
    resumed = train(keras.saving.load_model(tmp_path / "part.keras"), epochs=3 - cut)
    for straight, stopped in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(straight, stopped)
    assert zeros_of(resumed) == pytest.approx(0.8, abs=0.01)


def test_a_new_optimizer_does_not_start_the_schedule_again():
    pruned = train(prune(dense_model(), PolynomialDecay(0.0, 0.8, 0, 20, frequency=4)))
    before = zeros_of(pruned)
    pruned.compile("adam", "mse")
    watch = Watch()
    train(pruned, watch=watch)
    assert before > 0.7
    assert min(watch.zeros) >= before
    assert watch.zeros[-1] == pytest.approx(0.8, abs=0.01)


def test_the_mask_only_grows_while_sparsity_rises_under_a_random_order():
    pruned = prune(
        dense_model(), PolynomialDecay(0.1, 0.8, 1, 12, frequency=2), criterion="random", seed=1
    )
    watch = Watch()
    train(pruned, watch=watch)
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        assert not (after & ~before).any()


def test_a_loop_of_ones_own_gets_the_same_masks():
    import tensorflow as tf

    schedule = PolynomialDecay(0.1, 0.8, 1, 10, frequency=1)
    by_fit = train(prune(dense_model(), schedule))
    by_hand = prune(dense_model(), schedule)
    optimizer = keras.optimizers.SGD(0.01)
    optimizer.build(by_hand.trainable_variables)
    x, y = dense_data(8 * BATCHES)
    for step in range(1, BATCHES + 1):
        update_masks(by_hand, step)
        batch = slice(8 * step - 8, 8 * step)
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((by_hand(x[batch], training=True) - y[batch]) ** 2)
        variables = by_hand.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
    np.testing.assert_array_equal(masks_of(by_hand), masks_of(by_fit))


def test_raw_weights_are_zero_under_the_mask_after_an_epoch():
    pruned = train(prune(dense_model(), 0.5))
    for layer in pruned.layers:
        raw = keras.ops.convert_to_numpy(layer.variable("kernel"))
        mask = keras.ops.convert_to_numpy(layer.transforms[0][1].state["mask"])
        assert not raw[~mask].any()
        assert raw[mask].all()


def test_the_step_count_is_read_only_where_a_turn_may_be_near():
    reads = []

    class Counting(UpdatePruning):
        def _updates(self):
            reads.append(1)
            return super()._updates()

    pruned = prune(dense_model(), ConstantSparsity(0.5, 0, frequency=100))
    pruned.compile("sgd", "mse")
    x, y = dense_data(8 * 20)
    pruned.fit(x, y, batch_size=8, epochs=5, verbose=0, callbacks=[Counting()])
    assert len(reads) <= 6


def test_in_a_distiller_the_student_is_pruned_and_the_teacher_is_not():
    teacher, student = prune(dense_model(), 0.9), prune(dense_model(), 0.5)
    update_masks(teacher, 0)
    distiller = keras.distillation.Distiller(
        teacher, student, keras.distillation.LogitsDistillation()
    )
    distiller.compile("sgd", "mse")
    before = masks_of(teacher)
    x, y = dense_data(16)
    distiller.fit(x, y, verbose=0, callbacks=[UpdatePruning()])
    assert zeros_of(student) == 0.5
    np.testing.assert_array_equal(masks_of(teacher), before)


def test_nested_models_are_pruned():
    inputs = keras.Input((12,))
    model = keras.Model(inputs, layers.Dense(4, name="last")(dense_model()(inputs)))
    pruned = train(prune(model, 0.75))
    plain = tfaccel.strip(pruned)
    assert (plain.get_layer("dense").layers[0].get_weights()[0] == 0).mean() == 0.75


def test_a_model_without_masks_is_refused():
    model = dense_model()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"no masks in 'dense'.*prune"):
        model.fit(*dense_data(8), verbose=0, callbacks=[UpdatePruning()])
    with pytest.raises(ValueError, match="update_masks"):
        update_masks(model, 1)
