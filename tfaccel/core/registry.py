"""Names, configs and instances for everything that is replaceable."""

import difflib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import keras

T = TypeVar("T")


class Registry(Generic[T]):
    """Looks a part up by its name, its Keras config, or takes the instance as it is.

    Args:
        kind: what the parts are called in an error, such as "criterion".
        base: every part is an instance of this type.

    >>> numbers = Registry("number", int)
    >>> _ = numbers.register("one")(lambda: 1)
    >>> numbers.get("one"), numbers.get(7), numbers.names()
    (1, 7, ['one'])
    """

    def __init__(self, kind: str, base: type[T]) -> None:
        self._kind = kind
        self._base = base
        self._factories: dict[str, Callable[[], T]] = {}
        self._families: dict[str, Callable[[str], T | None]] = {}

    def register(self, name: str) -> Callable[[Callable[[], T]], Callable[[], T]]:
        """Returns a decorator that makes a class or factory known as `name`."""
        if name in self._factories:
            raise ValueError(f"There is a {self._kind} named {name!r} already.")

        def decorate(factory: Callable[[], T]) -> Callable[[], T]:
            self._factories[name] = factory
            return factory

        return decorate

    def family(self, form: str) -> Callable[[Callable[[str], T | None]], Callable[[str], T | None]]:
        """Returns a decorator for a function that reads names of one form, such as "2:4".

        Args:
            form: what such a name looks like, in an error.
        """

        def decorate(read: Callable[[str], T | None]) -> Callable[[str], T | None]:
            self._families[form] = read
            return read

        return decorate

    def names(self) -> list[str]:
        """Returns the known names, sorted; those of a family are not among them."""
        return sorted(self._factories)

    def get(self, identifier: str | dict[str, Any] | T) -> T:
        """Returns the part that `identifier` names, describes or is.

        Raises:
            ValueError: the name is not known, or the value is no such part.
        """
        if isinstance(identifier, self._base):
            return identifier
        if isinstance(identifier, str):
            return self._named(identifier)
        if isinstance(identifier, dict):
            part = keras.saving.deserialize_keras_object(identifier)
            if isinstance(part, self._base):
                return part
        raise ValueError(
            f"A {self._kind} is a name ({self._known()}), a Keras config or a "
            f"{self._base.__name__}; got {identifier!r}."
        )

    def _named(self, name: str) -> T:
        if name in self._factories:
            return self._factories[name]()
        for read in self._families.values():
            part = read(name)
            if part is not None:
                return part
        close = difflib.get_close_matches(name, self._factories, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no {self._kind} {name!r}. Known are: {self._known()}.{hint}")

    def _known(self) -> str:
        return ", ".join([*self.names(), *self._families])
