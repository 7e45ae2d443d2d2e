"""The type in which layers compute: their dtype policies, changed."""

from typing import Any

import keras

from tfaccel.core.cloning import copy_state


def with_policy(config: Any, name: str) -> Any:
    """Returns a layer's config with every policy of a float type in it replaced.

    Args:
        config: as `layer.get_config()` gives it.
        name: of the new policy, such as "float32".
    """
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            float_like = config["config"]["name"].startswith(("mixed_", "float", "bfloat"))
            return {**config, "config": {"name": name}} if float_like else config
        return {key: with_policy(value, name) for key, value in config.items()}
    if isinstance(config, list):
        return [with_policy(value, name) for value in config]
    return config


def change_policy(layer: keras.layers.Layer, name: str) -> keras.layers.Layer | None:
    """Returns a built copy of a layer under another policy, with its weights.

    Args:
        layer: a built layer; not changed.
        name: of the policy.

    Returns:
        The copy; None if the layer has that policy already.
    """
    config = layer.get_config()
    wanted = with_policy(config, name)
    if wanted == config:
        return None
    copy = type(layer).from_config(wanted)
    build_config = layer.get_build_config()
    if build_config and not copy.built:
        copy.build_from_config(build_config)
    copy.built = True
    copy_state(layer, copy)
    return copy
