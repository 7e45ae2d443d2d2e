"""Config derived from dataclass fields, so that no field can be forgotten in it."""

import dataclasses
from typing import Any, TypeVar

import keras

ConfigurableT = TypeVar("ConfigurableT", bound="Configurable")


class Configurable:
    """Mixin for dataclasses: the fields are the Keras config.

    Keras hands tuples back as lists; a subclass that cares normalises in `__post_init__`.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Rate(Configurable):
    ...     value: float = 0.5
    >>> Rate(0.25).get_config()
    {'value': 0.25}
    >>> Rate.from_config({"value": 0.25})
    Rate(value=0.25)
    """

    def get_config(self) -> dict[str, Any]:
        """Returns every constructor field, serialized by Keras."""
        return {
            field.name: keras.saving.serialize_keras_object(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if field.init
        }

    @classmethod
    def from_config(cls: type[ConfigurableT], config: dict[str, Any]) -> ConfigurableT:
        """Returns the object that `get_config` described."""
        return cls(
            **{
                name: keras.saving.deserialize_keras_object(value)
                if isinstance(value, (dict, list))
                else value
                for name, value in config.items()
            }
        )
