"""TFMOT's verbs for quantization-aware training on Keras 3: `quantize_model` and its parts."""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import keras

from tfaccel.compat.handover import is_tf_keras, tfmot_quantization, to_tfmot_config
from tfaccel.compat.quantize_configs import QuantizeConfig, Reading, read_config
from tfaccel.compat.quantize_schemes import Default8BitQuantizeScheme, DefaultNBitQuantizeScheme
from tfaccel.compat.quantizers import AllValuesFakeQuantize, with_range
from tfaccel.compat.wrapping import LateTransformedLayer
from tfaccel.core import keras_private
from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_built, clone_operation
from tfaccel.core.graph import Graph, Node, flat_layers, map_models
from tfaccel.core.transforms import TransformedLayer, WeightTransform, wrap_layer
from tfaccel.core.walking import map_layers
from tfaccel.quantization.fake_quantization import FakeQuantize
from tfaccel.quantization.operators import inner_layer, is_batch_norm, is_relu
from tfaccel.quantization.placement import FLOAT
from tfaccel.quantization.schemes import Scheme
from tfaccel.quantization.training import place

_PREFIX = "quant_"


@keras.saving.register_keras_serializable("tfaccel")
class QuantizeAnnotate(LateTransformedLayer):
    """A layer that `quantize_apply` will quantize; until then it computes as it did.

    Args:
        layer: any layer, built or not.
        quantize_config: how; by default as suits the layer.

    Raises:
        ValueError: it is no layer, or a model.
    """

    def __init__(
        self, layer: keras.layers.Layer, quantize_config: Any = None, **kwargs: Any
    ) -> None:
        _check_layer(layer)
        self.quantize_config = quantize_config
        self._begin(layer, kwargs)

    def _new_transforms(self) -> Mapping[str, WeightTransform]:
        return {}

    def get_config(self) -> dict[str, Any]:
        """Returns the inner layer and its config."""
        config = super().get_config()
        config.pop("transforms")
        serialized = keras.saving.serialize_keras_object(self.quantize_config)
        return {**config, "quantize_config": serialized}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "QuantizeAnnotate":
        """Returns the layer that `get_config` described, built if it was."""
        config = dict(config)
        for name in ("layer", "quantize_config"):
            if config[name] is not None:
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return cls(**config)


def quantize_model(to_quantize: Any, quantized_layer_name_prefix: str | None = _PREFIX) -> Any:
    """Makes a model that is trained for 8 bits, as TFMOT does.

    What the runtime has no integers for is an error, as with TFMOT;
    `tfaccel.quantization.quantize_aware` leaves it in float and says so. Given a model of tf_keras,
    TFMOT itself is called.

    Args:
        to_quantize: a built Sequential or Functional model; not changed.
        quantized_layer_name_prefix: as it is by default, "" or None. Layers keep their names.

    Returns:
        A new model without an optimizer.

    Raises:
        RuntimeError: a layer is not covered.
        ValueError: no such model, or another prefix.
    """
    if is_tf_keras(to_quantize):
        return tfmot_quantization().quantize_model(to_quantize, quantized_layer_name_prefix)
    _check_prefix(quantized_layer_name_prefix)
    _check_graph(to_quantize, "quantize_model")
    return quantize_apply(quantize_annotate_model(to_quantize))


def quantize_annotate_model(to_annotate: Any) -> Any:
    """Marks every layer of a model for `quantize_apply`; those that are marked stay as they are.

    Args:
        to_annotate: a Sequential or Functional model; not changed.

    Raises:
        ValueError: no such model.
    """
    if is_tf_keras(to_annotate):
        return tfmot_quantization().quantize_annotate_model(to_annotate)

    def annotated(layer: Any, *, built: bool = True) -> QuantizeAnnotate | None:
        if isinstance(layer, (QuantizeAnnotate, keras.layers.InputLayer)):
            return None
        if isinstance(layer, keras.layers.Lambda):
            warnings.warn(
                f"Lambda layer {layer.name!r} stays in float: what it computes cannot be known. "
                "Make it a layer, and annotate it with a QuantizeConfig.",
                stacklevel=3,
            )
            return None
        return QuantizeAnnotate(clone_built(layer) if built else clone_operation(layer))

    if isinstance(to_annotate, keras.Sequential) and not keras_private.has_graph(to_annotate):
        marked = [annotated(layer, built=layer.built) or layer for layer in to_annotate.layers]
        return keras.Sequential(marked, name=to_annotate.name)
    _check_graph(to_annotate, "quantize_annotate_model")
    return map_layers(to_annotate, annotated)


def quantize_annotate_layer(to_annotate: Any, quantize_config: Any = None) -> Any:
    """Marks a layer for `quantize_apply`.

    Args:
        to_annotate: a layer, built or not.
        quantize_config: a `QuantizeConfig`; by default what suits the layer.

    Raises:
        ValueError: no layer, or no such config.
    """
    if is_tf_keras(to_annotate):
        theirs = None if quantize_config is None else to_tfmot_config(quantize_config)
        return tfmot_quantization().quantize_annotate_layer(to_annotate, theirs)
    _check_layer(to_annotate)
    if quantize_config is not None and not isinstance(quantize_config, QuantizeConfig):
        raise ValueError(
            "quantize_config must be a tfaccel.compat.tfmot.quantization.keras.QuantizeConfig, but "
            f"got {quantize_config!r}."
        )
    return QuantizeAnnotate(to_annotate, quantize_config)


def quantize_apply(
    model: Any,
    scheme: Any = None,
    quantized_layer_name_prefix: str | None = _PREFIX,
) -> Any:
    """Makes an annotated model one that rounds in training.

    Args:
        model: a built Sequential or Functional model with annotated layers; not changed.
        scheme: a `Default8BitQuantizeScheme` (the default) or `DefaultNBitQuantizeScheme`.
        quantized_layer_name_prefix: see `quantize_model`.

    Returns:
        A new model without an optimizer.

    Raises:
        RuntimeError: an annotated layer without a config is not covered.
        ValueError: no such model, nothing is annotated, or a config wants what cannot be had.
    """
    if is_tf_keras(model):
        return _hand_over(model, scheme, quantized_layer_name_prefix)
    _check_prefix(quantized_layer_name_prefix)
    chosen = Default8BitQuantizeScheme() if scheme is None else scheme
    if not isinstance(chosen, Default8BitQuantizeScheme):
        raise ValueError(  # noqa: TRY004  TFMOT has others
            "scheme must be a Default8BitQuantizeScheme or DefaultNBitQuantizeScheme, but got "
            f"{scheme!r}. For others, see tfaccel.quantization.quantize_aware(model, scheme)."
        )
    _check_graph(model, "quantize_apply")
    configs: dict[str, QuantizeConfig | None] = {
        layer.name: layer.quantize_config
        for layer in flat_layers(model)
        if isinstance(layer, QuantizeAnnotate)
    }
    if not configs:
        raise ValueError(
            f"quantize_apply() found no annotated layer in {model.name!r}. Annotate some with "
            "quantize_annotate_layer, or all with quantize_annotate_model."
        )
    plain = map_layers(model, _unmarked)
    readings = {}
    for layer in flat_layers(plain):
        config = configs.get(layer.name)
        if config is not None:
            inner = layer.layer if isinstance(layer, TransformedLayer) else layer
            readings[layer.name] = read_config(config, inner)
    return _quantize(plain, chosen.scheme, set(configs), readings)


def quantize_scope(*args: dict[str, Any]) -> AbstractContextManager[Any]:
    """Returns a scope in which quantized models can be loaded.

    tfaccel registers its own classes, so that the scope is needed for the user's alone.

    Args:
        *args: dicts of custom objects by name.
    """
    ours = {
        kind.__name__: kind for kind in (AllValuesFakeQuantize, QuantizeAnnotate, TransformedLayer)
    }
    scopes = contextlib.ExitStack()
    scopes.enter_context(keras.saving.custom_object_scope({**ours, **_joined(args)}))
    if "tensorflow_model_optimization" in sys.modules:  # a model of tf_keras may be loaded too
        scopes.enter_context(tfmot_quantization().quantize_scope(*args))
    return scopes


def _joined(dicts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {name: value for objects in dicts for name, value in objects.items()}


def _unmarked(layer: Any) -> keras.layers.Layer | None:
    return clone_built(layer.layer) if isinstance(layer, QuantizeAnnotate) else None


def _quantize(
    plain: keras.Model, scheme: Scheme, annotated: set[str], readings: dict[str, Reading]
) -> keras.Model:
    in_integers = {name for name in annotated if name not in readings or readings[name].integer}
    per_layer = {name: readings[name].scheme for name in in_integers if name in readings}
    placed, decisions = place(
        plain, scheme, lambda layer: layer.name in in_integers, None, per_layer=per_layer
    )
    refused = {d.name: d.reason for d in decisions if d.action == FLOAT and d.name in in_integers}
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise RuntimeError(
            f"These layers of {plain.name!r} cannot be quantized ({reasons}). Annotate the others "
            "alone, or use tfaccel.quantization.quantize_aware(model), which leaves in float what "
            "it does not cover."
        )

    def edit(graph: Graph) -> None:
        for node in list(graph.nodes):
            name = getattr(inner_layer(node), "name", "")
            if name in readings:
                _follow(graph, node, readings[name], whole=name in in_integers)

    return map_models(placed, edit) if readings else placed


def _follow(graph: Graph, node: Node, reading: Reading, *, whole: bool) -> None:
    """Rounds what the placement leaves in float, and sets how ranges are found."""
    layer = node.layer
    if not whole and reading.weights is not None and layer is not None:
        kernel = type(reading.weights).from_config(reading.weights.get_config())
        graph.replace_layer(layer, wrap_layer(layer, {"kernel": kernel}))
    if reading.output is None:
        return
    rounding = _rounding_behind(graph, node)
    wanted: Any = reading.output
    if rounding is None and whole:
        raise ValueError(
            f"The output of {node.name!r} has no range of its own, since the runtime gives it that "
            "of what reads it or a fixed one. Leave its quantizer out of the config."
        )
    if rounding is None:
        name = f"{node.name}_quantize"
        rounding = FakeQuantize(wanted.num_bits, name=name)
        graph.insert_after(node.outputs[0], with_range(rounding, wanted) or rounding)
        return
    if rounding.fixed_range is None and rounding.bits != wanted.num_bits:
        raise ValueError(
            f"The output of {node.name!r} cannot have {wanted.num_bits} bits: fewer than 8 are for "
            "what a ReLU gives."
        )
    changed = with_range(rounding, wanted)
    if changed is not None:
        graph.replace_layer(rounding, changed)


def _rounding_behind(graph: Graph, node: Node) -> FakeQuantize | None:
    """Returns what rounds the output of a call, behind its batch norm and ReLU."""
    while True:
        readers = graph.consumers(node.outputs[0])
        for reader in readers:
            if isinstance(reader.layer, FakeQuantize):
                return reader.layer
        if len(readers) != 1 or not (is_relu(readers[0]) or is_batch_norm(readers[0])):
            return None
        node = readers[0]


def _hand_over(model: Any, scheme: Any, prefix: str | None) -> Any:
    theirs = tfmot_quantization()
    given = {} if scheme is None else {"scheme": scheme}
    if isinstance(scheme, DefaultNBitQuantizeScheme):
        kind = theirs.experimental.default_n_bit.DefaultNBitQuantizeScheme
        given = {"scheme": kind(**dataclasses.asdict(scheme))}
    elif isinstance(scheme, Default8BitQuantizeScheme):
        given = {"scheme": theirs.default_8bit.Default8BitQuantizeScheme()}
    return theirs.quantize_apply(model, quantized_layer_name_prefix=prefix, **given)


def _check_prefix(prefix: str | None) -> None:
    if prefix not in (_PREFIX, "", None):
        raise ValueError(
            f"quantized_layer_name_prefix={prefix!r} cannot be had: layers keep their names. Leave "
            "it out."
        )


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, keras.Model):
        raise ValueError(  # noqa: TRY004  TFMOT's kind of error
            f"What is annotated is a keras.layers.Layer and no model, but got {layer!r}. For "
            "models there is quantize_annotate_model."
        )


def _check_graph(model: Any, verb: str) -> None:
    try:
        check_model(model, verb)
    except TypeError as error:  # TFMOT's kind of error, which callers may expect
        raise ValueError(str(error)) from error
