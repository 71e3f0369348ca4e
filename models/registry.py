"""Base classes that register their subclasses by kind, and settings that accept every registered kind."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class Kind:
    """Base of classes that settings select by `kind`; a subclass that defines `kind` registers itself."""

    registry: ClassVar[dict[str, type[Any]]]
    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class.

        Raises:
            TypeError: If another class already uses the kind.
        """
        super().__init_subclass__(**kwargs)
        if Kind in cls.__bases__:
            cls.registry = {}
        if "kind" in vars(cls):
            _register(cls.registry, cls.kind, cls)


class _LateChoice(ABC):
    """Metadata of a setting whose accepted values are looked up when it is validated, since parts register later."""

    @abstractmethod
    def _choice(self) -> TypeAdapter[Any]:
        """Return an adapter for the values that are accepted now."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: self._choice().validate_python(value))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self._choice().core_schema)


class KindOf(_LateChoice):
    """Metadata that restricts a setting to registered kinds, as in `Annotated[str, KindOf(Attack)]`.

    Args:
        base: Class whose registered kinds are accepted.
        *others: Further accepted values.
    """

    def __init__(self, base: type[Kind], *others: str) -> None:
        self.base, self.others = base, others

    def _choice(self) -> TypeAdapter[Any]:
        choice: Any = Literal[(*self.base.registry, *self.others)]
        return TypeAdapter(choice)


class KindConfig(BaseModel):
    """Base of settings classes that are selected by their field `kind`.

    A subclass registers itself under the default of its field `kind`. A class without such a default represents all
    registered subclasses: a setting of its type accepts each of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    registry: ClassVar[dict[str, type["KindConfig"]]]
    if TYPE_CHECKING:
        kind: str  # subclasses define the field, each at its own position

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """Return the registered subclasses by kind, including this class, in order of definition."""
        return {kind: subclass for kind, subclass in cls.registry.items() if issubclass(subclass, cls)}

    @classmethod
    def own_kind(cls) -> str | None:
        """Return the kind of this class, or None if it represents several."""
        field = cls.model_fields.get("kind")
        return field.default if field is not None and isinstance(field.default, str) else None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class.

        Raises:
            TypeError: If another class already uses the kind.
        """
        super().__pydantic_init_subclass__(**kwargs)
        if KindConfig in cls.__bases__:
            cls.registry = {}
        kind = cls.own_kind()
        existing = cls.registry.get(kind) if kind is not None else None
        if kind is not None and not (existing is not None and issubclass(cls, existing)):
            _register(cls.registry, kind, cls)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if cls.own_kind() is not None:
            return handler(source)
        return core_schema.no_info_plain_validator_function(lambda value: cls._choice().validate_python(value))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema if cls.own_kind() is not None else cls._choice().core_schema)

    @classmethod
    def _choice(cls) -> TypeAdapter[Any]:
        return _union(tuple(cls.kinds().values()))


def _register(registry: dict[str, type[Any]], kind: str, cls: type[Any]) -> None:
    """Register a class, or replace the earlier class of the same name, as when a notebook cell runs again.

    Raises:
        TypeError: If another class already uses the kind.
    """
    existing = registry.get(kind)
    if existing is not None and (existing.__module__, existing.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"kind={kind}: already used by {existing.__module__}.{existing.__qualname__}; use another name")
    registry[kind] = cls


class OtherKinds(_LateChoice):
    """Metadata that restricts a setting to registered kinds other than one, as in `Annotated[Base, OtherKinds(...)]`.

    A class of settings uses it for settings of its own base, since its schema would otherwise contain itself.

    Args:
        base: Class whose registered kinds are accepted.
        excluded: Kind that is not accepted.
    """

    def __init__(self, base: type[KindConfig], excluded: str) -> None:
        self.base, self.excluded = base, excluded

    def _choice(self) -> TypeAdapter[Any]:
        return _union(self.classes())

    def classes(self) -> tuple[type[KindConfig], ...]:
        """Return the accepted classes, in order of definition."""
        return tuple(cls for kind, cls in self.base.kinds().items() if kind != self.excluded)


@lru_cache
def _union(classes: tuple[type[KindConfig], ...]) -> TypeAdapter[Any]:
    """Return an adapter for the union of two or more classes, discriminated by `kind`."""
    choice: Any = Annotated[Union[classes], Field(discriminator="kind")]  # noqa: UP007
    return TypeAdapter(choice)
