"""Post-training quantization: a float model and some data in, a model ready to export out."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_model, check_positive, check_type
from tfaccel.core.graph import flat_layers
from tfaccel.core.selection import Selector
from tfaccel.core.stripping import bake_weights
from tfaccel.core.transforms import TransformedLayer
from tfaccel.quantization.allocation import Allocation
from tfaccel.quantization.bias_correction import (
    ANALYTIC,
    EMPIRICAL,
    analytic_bias,
    check_correction,
    empirical_bias,
    mean_of_lost,
)
from tfaccel.quantization.calibration import (
    CALIBRATORS,
    Calibrator,
    Statistics,
    observe,
    set_ranges,
)
from tfaccel.quantization.equalization import equalize_folded
from tfaccel.quantization.fake_quantization import FakeQuantize, FakeQuantizeWeights
from tfaccel.quantization.grids import round_to, weight_scales
from tfaccel.quantization.moments import UNKNOWN, Moments, follow_moments
from tfaccel.quantization.patches import AS_MATRICES, to_kernel, to_matrices
from tfaccel.quantization.placement import QUANTIZED
from tfaccel.quantization.rounding import ROUNDINGS, Rounding
from tfaccel.quantization.schemes import DYNAMIC_INT8, FLOAT16, FLOAT32, SCHEMES, Scheme
from tfaccel.quantization.second_order import GPTQ
from tfaccel.quantization.sequential import LayerProblem, SequentialAdjustment
from tfaccel.quantization.training import is_quantization_aware, name_floats, place, written_out
from tfaccel.rewriting import fold_batch_norm
from tfaccel.rewriting.sampling import Batch, gather_batches, outputs_of

__all__ = ["GPTQ", "quantize"]

Array = npt.NDArray[Any]

AUTO = "auto"
_HELD_OUT = 4  # of so many batches, one judges the calibrators


def quantize(
    model: keras.Model,
    calibration_data: Any,
    scheme: str | Scheme | Allocation = "int8",
    *,
    calibrator: str | dict[str, Any] | Calibrator = "percentile",
    equalize: bool = False,
    correct_bias: str | bool = True,
    rounding: str | dict[str, Any] | Rounding = "nearest",
    include: Selector | None = None,
    exclude: Selector | None = None,
    samples: int = 256,
    seed: int = 0,
    verbose: bool = False,
) -> keras.Model:
    """Returns a model that computes as the integer runtime will, made from a float one and data.

    Batch norm is folded, the kernels are rounded, and each value between layers gets a range from
    what it was on the calibration data. The result is of the kind that `quantize_aware` makes: run
    it in Keras to see its accuracy, hand it to `tfaccel.export.to_tflite` as it is, or compile and
    fit it to train on.

    Args:
        model: a built Functional or Sequential model, plain or pruned; not changed.
        calibration_data: some hundred samples of what the model will get, without labels that
            would be used: an array [samples, ...], for several inputs a list or dict of such, a
            tuple (x, y), or batches of one of these (a tf.data.Dataset). Never the data that the
            accuracy is measured on.
        scheme: "int8"; "int4" (kernels in 4 bits, those of the first and the last layer in 8,
            values in 8); "int16x8" (values in 16 bits); "int4_weight_only" (values in float); a
            `Scheme`, or what `allocate_bits` has chosen for each layer.
        calibrator: makes ranges of what was seen: "minmax", "moving_average", "percentile" (99.99 %
            of the values on either side), "entropy", "mse", an instance of one of
            these, or "auto": whichever has the least error at the model's outputs on a quarter of
            the calibration batches, held out from the ranges.
        equalize: moves ranges across layers first, see `tfaccel.quantization.equalize`; ReLU6
            stays.
        correct_bias: "empirical" (or True): the mean error of every layer on the calibration data
            is taken back by its bias, one layer after the other; "analytic": by what batch norm
            says of the inputs, without data, where it says anything; "none" (or False).
        rounding: of kernels: "nearest"; "adaround" (up or down, as the layer's output wants
            it); "gptq" (one weight after the other, the rest making up for it); or an
            instance of `AdaRound` or `GPTQ` with settings of its own. The last two also make
            up for the errors of the layers before, and are what 4 bits need.
        include: layers to quantize (names, patterns, predicate); by default all that are covered.
        exclude: layers to leave in float.
        samples: of the calibration data, at most so many; of arrays a random choice.
        seed: of all choices.
        verbose: prints each layer that is done.

    Returns:
        The quantized model, layer names those of the folded original. What stays in float is named
        in a logged line.

    Raises:
        TypeError: the model is subclassed, or the data are of another kind.
        ValueError: the model is not built or is quantization-aware already, the data do not fit
            it, the scheme has no integers between layers, a name is not known, a value is not
            finite, there is nothing to quantize, or no batch norm to correct biases by.

    References:
        Krishnamoorthi 2018, Quantizing deep convolutional networks for efficient inference; Nagel
        et al. 2021, A White Paper on Neural Network Quantization.
    """
    check_model(model, "quantize")
    per_layer = scheme.per_layer if isinstance(scheme, Allocation) else None
    chosen = SCHEMES.get(scheme.scheme if isinstance(scheme, Allocation) else scheme)
    how = ROUNDINGS.get(rounding)
    ranges = None if calibrator == AUTO else CALIBRATORS.get(calibrator)
    correction = check_correction(correct_bias)
    check_type("equalize", equalize, bool)
    check_positive("samples", samples)
    _check_scheme(chosen)
    if is_quantization_aware(model):
        raise ValueError(
            f"{model.name!r} is quantized already. Begin with the float model that it was made "
            "from, or train it on."
        )
    batches = gather_batches(model, calibration_data, samples, seed, "quantize")
    plain = bake_weights(model)
    moments: dict[str, Moments] = {}
    if correction == ANALYTIC:
        moments = follow_moments(written_out(plain, chosen, include, exclude))[0]
        _check_moments(model, moments)
    folded = fold_batch_norm(plain)
    if equalize:
        folded, factors = equalize_folded(folded)
        moments = {name: m.divided_by(factors.get(name)) for name, m in moments.items()}
    placed, decisions = place(folded, chosen, include, exclude, per_layer=per_layer)
    if all(decision.action != QUANTIZED for decision in decisions):
        reasons = "; ".join(f"{d.name}: {d.reason}" for d in decisions)
        raise ValueError(
            f"quantize() found nothing to quantize in {model.name!r} ({reasons or 'no layers'})."
        )
    name_floats(model, decisions)
    if ranges is None:
        ranges = choose_calibrator(placed, batches, verbose=verbose)
    set_ranges(observe(placed, batches), ranges)
    if how.sequential or correction == EMPIRICAL:
        _adjust_in_turn(placed, batches, how, correction, moments, seed=seed, verbose=verbose)
    else:
        round_to_nearest(placed, moments)
    return placed


def _check_scheme(scheme: Scheme) -> None:
    if scheme in (FLOAT32, FLOAT16, DYNAMIC_INT8):
        raise ValueError(
            f"quantize() is for schemes that round by what is seen in data ('int8', 'int4', "
            f"'int16x8', 'int4_weight_only'), but got {scheme.name!r}, which needs no calibration: "
            f"export.to_tflite(model, path, scheme={scheme.name!r})."
        )
    if not scheme.symmetric_weights or scheme.weight_block is not None:
        raise ValueError(
            f"quantize() rounds kernels to symmetric grids with one step for each output, but "
            f"{scheme.name!r} has others. Train for it: quantize_aware(model, {scheme.name!r})."
        )


def _check_moments(model: keras.Model, moments: dict[str, Moments]) -> None:
    if not any(known.known for known in moments.values()):
        raise ValueError(
            f"correct_bias='analytic' goes by what batch norm says of the inputs of layers, but "
            f"{model.name!r} has no batch norm in front of one. Leave it to the data: "
            "correct_bias='empirical'."
        )


def choose_calibrator(
    model: keras.Model, batches: Sequence[Batch], *, verbose: bool = False
) -> Calibrator:
    """Returns the calibrator whose ranges leave the least error at a model's outputs.

    Every fourth batch judges what the others have given; fewer batches than four are divided. Each
    output counts by its own variance.

    Args:
        model: with fake quantization; its ranges are overwritten.
        batches: of calibration data.
        verbose: prints the errors.
    """
    if len(batches) < _HELD_OUT:
        batches = [part for batch in batches for part in _divided(batch)]
    judges = batches[_HELD_OUT - 1 :: _HELD_OUT] or batches[-1:]
    others = [batch for batch in batches if not any(batch is judge for judge in judges)] or judges
    statistics = observe(model, others)
    _forget(statistics)
    expected = [outputs_of(model, batch) for batch in judges]
    variances = [
        float(np.var(np.concatenate([np.ravel(batch) for batch in values]))) or 1.0
        for values in zip(*expected, strict=True)
    ]
    errors: dict[str, float] = {}
    for name in CALIBRATORS.names():
        set_ranges(statistics, CALIBRATORS.get(name))
        errors[name] = sum(
            float(((ours - wanted) ** 2).sum()) / variance
            for batch, ends in zip(judges, expected, strict=True)
            for ours, wanted, variance in zip(
                outputs_of(model, batch), ends, variances, strict=True
            )
        )
        if verbose:
            print(f"calibrator {name}: squared error {errors[name]:.4g}", flush=True)  # noqa: T201
    return CALIBRATORS.get(min(errors, key=lambda name: errors[name]))


def _divided(batch: Batch) -> list[Batch]:
    """Returns a batch in as many parts as there are judges to be had, none of them empty."""
    count = min(_HELD_OUT, len(batch[0]))
    parts = zip(*(np.array_split(array, count) for array in batch), strict=True)
    return [list(part) for part in parts]


def _forget(statistics: dict[FakeQuantize, Statistics]) -> None:
    for layer in statistics:
        layer.set_range(0.0, 0.0)  # an empty range rounds nothing


def _adjust_in_turn(
    model: keras.Model,
    batches: Sequence[Batch],
    how: Rounding,
    correction: str,
    moments: dict[str, Moments],
    *,
    seed: int,
    verbose: bool,
) -> None:
    def adjust(problem: LayerProblem) -> tuple[Array, Array]:
        weight = how.round_weight(problem)
        if correction == EMPIRICAL:
            bias = empirical_bias(problem, weight)
        else:
            known = moments.get(problem.name, UNKNOWN)
            bias = problem.bias + mean_of_lost(problem.weight - weight, known)
        if verbose:
            error = np.mean(
                (np.matmul(problem.inputs, weight) + bias - problem.float_outputs()) ** 2
            )
            power = np.var(problem.float_outputs())
            noise = 10 * np.log10(error / power + 1e-12)
            print(f"{problem.name}: noise {noise:.1f} dB", flush=True)  # noqa: T201
        return weight, bias

    SequentialAdjustment(model, batches, adjust, seed=seed).run()


def round_to_nearest(model: keras.Model, moments: dict[str, Moments]) -> None:
    """Puts each kernel on the grid of least squared error, in place.

    Args:
        model: with fake quantization of weights.
        moments: of the inputs of layers by name, whose biases are then corrected; may be empty.
    """
    for wrapped in flat_layers(model):
        if not isinstance(wrapped, TransformedLayer):
            continue
        layer: Any = wrapped.layer
        bits = [t.bits for _, t in wrapped.transforms if isinstance(t, FakeQuantizeWeights)]
        if not bits or type(layer) not in AS_MATRICES:
            continue
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        weight = to_matrices(layer, kernel)
        rounded = to_kernel(layer, round_to(weight, weight_scales(weight, bits[0]), bits[0]))
        known = moments.get(layer.name)
        if known is not None and known.known and layer.use_bias:
            layer.bias.assign(analytic_bias(layer, kernel, rounded, known))
        layer.kernel.assign(rounded)
