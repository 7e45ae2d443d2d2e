"""Objects of tf_keras (Keras 2) go to TFMOT itself, which knows no other."""

from typing import Any

from tfaccel.core.schedules import ConstantSparsity, PolynomialDecay


def is_tf_keras(value: Any) -> bool:
    """Whether an object, or the first of a list, is of tf_keras."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return any(kind.__module__.partition(".")[0] == "tf_keras" for kind in type(first).__mro__)


def tfmot_pruning() -> Any:
    """Returns `tensorflow_model_optimization.sparsity.keras`.

    Raises:
        ImportError: it is not installed.
    """
    return _tfmot().sparsity.keras


def tfmot_clustering() -> Any:
    """Returns `tensorflow_model_optimization.clustering.keras`.

    Raises:
        ImportError: it is not installed.
    """
    return _tfmot().clustering.keras


def tfmot_quantization() -> Any:
    """Returns `tensorflow_model_optimization.quantization.keras`.

    Raises:
        ImportError: it is not installed.
    """
    return _tfmot().quantization.keras


def _tfmot() -> Any:
    try:
        import tensorflow_model_optimization as tfmot
    except ImportError as error:
        raise ImportError(
            "This model is of tf_keras (Keras 2), for which tfaccel hands over to TFMOT itself, "
            "but that is not installed. Run pip install tensorflow-model-optimization tf-keras, or "
            "make the model with Keras 3."
        ) from error
    return tfmot


def to_tfmot(schedule: Any) -> Any:
    """Returns TFMOT's twin of a schedule of ours; anything else as it is."""
    if isinstance(schedule, (ConstantSparsity, PolynomialDecay)):
        return getattr(tfmot_pruning(), type(schedule).__name__)(**schedule.get_config())
    return schedule


def to_tfmot_config(config: Any) -> Any:
    """Returns a quantize config that is of TFMOT's class too, which TFMOT demands."""
    theirs = tfmot_quantization().QuantizeConfig
    if isinstance(config, theirs):
        return config
    # Of the same name, by which tf_keras finds the user's class when the model is cloned.
    twin: Any = type(type(config).__name__, (type(config), theirs), {})
    return twin.from_config(config.get_config())
