"""Arguments and results as JSON text and back: one pydantic schema per signature, and no value changes on the way."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import inspect
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NotRequired, TypeAlias, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, PydanticUserError, RootModel, TypeAdapter, ValidationError
from pydantic_core import to_json
from typing_extensions import TypedDict  # pydantic accepts the standard library's only from Python 3.12 on

from ._signatures import annotations_of, signature_of
from ._text import type_name
from .errors import NotSerializable
from .tasks import code_name, flattened

Func: TypeAlias = Callable[..., object]
Fields: TypeAlias = dict[str, Any]
Form: TypeAlias = TypeAdapter[Fields]

# Bytes that are no UTF-8 would fail, and nan would become null.
_CONFIG = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings", extra="forbid")

_VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_BY_POSITION = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL

#: Signatures whose schema is kept; functions may be made on the fly.
_CACHED = 1000

#: A result of more bytes of JSON is not kept.
LARGEST_RESULT = 16_384

#: Arguments of a durable run of more bytes of JSON are refused: SQLite writes the row again at each of its changes.
LARGEST_ARGUMENTS = 1024 * 1024


class DoesNotFit(Exception):
    """Stored arguments do not fit the signature that the function has here."""


def encode(func: Func, args: Sequence[object], kwargs: Mapping[str, object], *, largest: float = math.inf) -> str:
    """
    A call's arguments as a JSON object by the names of the parameters.

    They are decoded and compared, by type and value: what would come back as something else is refused. A datetime
    keeps its UTC offset, not the name of its zone; a model keeps which of its fields were set.

    Raises:
        NotSerializable: An argument would not come back as it is; the message names it. Or the text has more than
            `largest` bytes.
    """
    func, args, kwargs = flattened(func, args, kwargs)  # only the function is found again by name
    signature, form = _form_of(func)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise NotSerializable(f"{code_name(func)}: {error}") from None
    text = _round_trip(form, given)
    if text is None:
        raise _refusal(func, signature, given)
    if len(text) > largest:
        raise NotSerializable(
            f"{code_name(func)}: its arguments are {len(text)} bytes of JSON, and at most {largest} can be stored; put "
            f"the data in a database or a file, and pass its key"
        )
    return text.decode()


def decode(func: Func, text: str) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """
    The positional and the keyword arguments of a stored call.

    Raises:
        DoesNotFit: They do not fit the signature that the function has now.
    """
    try:
        signature, form = _form_of(func)
        bound = signature.bind_partial()
        bound.arguments.update(form.validate_json(text))
        _fill_gaps(bound)
        signature.bind(*bound.args, **bound.kwargs)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DoesNotFit(f"{where}: {error.errors()[0]['msg']}") from None
    except Exception as error:  # of a validator of the app's, too
        raise DoesNotFit(f"{type_name(type(error))}: {error}") from None
    return bound.args, bound.kwargs


def _fill_gaps(bound: inspect.BoundArguments) -> None:
    """Give new parameters their default if a later parameter can be passed by position only."""
    is_gap = False
    for name, parameter in reversed(list(bound.signature.parameters.items())):
        if name in bound.arguments:
            is_gap = is_gap or parameter.kind in _BY_POSITION
        elif is_gap and parameter.default is not parameter.empty:
            bound.arguments[name] = parameter.default


def encode_result(result: object) -> str:
    """
    What a function returned, as JSON.

    Raises:
        NotSerializable: It cannot be written as JSON, is too large, or has an iterator at any depth.
    """
    try:
        for count, part in enumerate(_parts(result)):
            if isinstance(part, Iterator):  # pydantic would run it, on the event loop
                raise NotSerializable(
                    f"a result with a {type(part).__qualname__} cannot be kept: reading it would run it"
                )
            if count > LARGEST_RESULT:  # of which each has a byte at least
                raise NotSerializable(f"a result of more than {LARGEST_RESULT} parts cannot be kept")
        text = to_json(result, bytes_mode="base64", inf_nan_mode="strings")
    except NotSerializable:
        raise
    except Exception as error:  # of a serializer of the app's
        raise NotSerializable(f"a result of type {type(result).__qualname__} cannot be kept: {error}") from None
    if len(text) > LARGEST_RESULT:
        raise NotSerializable(f"a result of {len(text)} bytes cannot be kept; at most {LARGEST_RESULT} are")
    return text.decode()


def _parts(value: object) -> Iterator[object]:
    """A value, and everything that is written with it."""
    yield value
    inner: Iterable[object] = ()
    match value:
        case str() | int() | float() | None:
            return
        case dict():
            inner = value.values()
        case list() | tuple() | set() | frozenset() | deque():
            inner = value
        case _ if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
            inner = _attributes(value).values()
    for part in inner:
        yield from _parts(part)


def same(one: object, other: object) -> bool:
    """Whether two values are equal and of the same types, all the way down."""
    if type(one) is not type(other):
        return False
    match one, other:
        case float(), float():
            return (math.isnan(one) and math.isnan(other)) or (one == other and str(one) == str(other))
        case Decimal(), Decimal():  # 1.0 equals 1.00, and nan not itself
            return str(one) == str(other)
        case ((dt.datetime() | dt.time()), (dt.datetime() | dt.time())):
            return _same_time(one, other)
        case ((list() | tuple() | deque()), (list() | tuple() | deque())):
            return _alike("maxlen", one, other) and len(one) == len(other) and all(map(same, one, other))
        case dict(), dict():
            return _alike("default_factory", one, other) and same(list(one.items()), list(other.items()))
        case ((set() | frozenset()), (set() | frozenset())):
            twins = {each: each for each in other}
            return len(one) == len(other) and all(each in twins and same(each, twins[each]) for each in one)
        case BaseModel(), BaseModel():
            return _same_models(one, other)
    if dataclasses.is_dataclass(one):
        return same(_attributes(one), _attributes(other))
    return bool(one == other)


def _alike(name: str, one: object, other: object) -> bool:
    """Whether both have the same attribute of this name, or none."""
    return bool(getattr(one, name, None) == getattr(other, name, None))


def _same_models(one: BaseModel, other: BaseModel) -> bool:
    """Whether two models are the same in every part. Pydantic's == ignores types, and which fields were set."""
    return (
        same(_attributes(one), _attributes(other))
        and same(one.__pydantic_private__, other.__pydantic_private__)
        and _same_fields_set(one, other)
    )


def _attributes(value: object) -> Fields:
    """The values in a model or a dataclass, also in attributes that are not fields, but without cached properties."""
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields} | (value.model_extra or {})
    fields: Sequence[dataclasses.Field[object]] = dataclasses.fields(value)  # type: ignore[arg-type]  # is_dataclass
    others = {
        name: part
        for name, part in getattr(value, "__dict__", {}).items()
        if not isinstance(getattr(type(value), name, None), functools.cached_property)
    }
    return {field.name: getattr(value, field.name) for field in fields} | others


def _same_time(one: dt.datetime | dt.time, other: dt.datetime | dt.time) -> bool:
    """Whether two times show the same and have the same UTC offset, if any; without one, also whether they repeat."""
    # Not ==: by PEP 495 a datetime in a repeated hour equals none of another zone.
    if one.replace(tzinfo=None, fold=0) != other.replace(tzinfo=None, fold=0):
        return False
    if one.tzinfo is None or other.tzinfo is None:
        return one.tzinfo is other.tzinfo and one.fold == other.fold
    return one.utcoffset() == other.utcoffset()


def _same_fields_set(one: BaseModel, other: BaseModel) -> bool:
    """Whether `exclude_unset` leaves out the same fields; one with another value than its default counts as set."""
    if one.model_fields_set == other.model_fields_set:
        return True
    return _fields_at_default(one) == _fields_at_default(other)


def _fields_at_default(model: BaseModel) -> set[str]:
    """The fields that were not set, and still have their default. Not a literal: it may be the tag of a union."""
    fields = {
        name: field for name, field in type(model).model_fields.items() if get_origin(field.annotation) is not Literal
    }
    return {
        name
        for name in fields.keys() - model.model_fields_set
        if same(
            getattr(model, name),
            fields[name].get_default(call_default_factory=True, validated_data=vars(model)),
        )
    }


def _round_trip(form: Form, given: Fields) -> bytes | None:
    """Arguments as JSON that decodes to the same values; None if there is no such JSON."""
    for leave_out, by_alias in itertools.product((_what_was_not_set, _what_is_at_default), (True, False)):
        try:
            text = form.dump_json(given, warnings="error", round_trip=True, by_alias=by_alias, **leave_out(given))
            if same(given, form.validate_json(text)):
                return text
        except Exception:  # of validators, serializers and comparisons of the app's, too
            continue
    return None


def _what_was_not_set(_: Fields) -> Fields:
    """How most models come back as they are, as a PATCH needs; the other way has to look at every value."""
    return {"exclude_unset": True}


def _what_is_at_default(given: Fields) -> Fields:
    """For a default changed in place or made anew, as by `uuid4`, and fields that `__init__` does not take."""
    return {"exclude": _at_default(given)}


def _at_default(value: object) -> dict[object, object]:
    """What pydantic's `exclude` takes to leave out the fields at their default or not given, at any depth."""
    parts: Iterable[tuple[object, object]] = ()
    left_out: set[str] = set()
    match value:
        case RootModel():
            return _at_default(value.root)
        case BaseModel():
            parts, left_out = _attributes(value).items(), _fields_at_default(value)
        case dict():
            parts = value.items()
        case list() | tuple() | deque():
            parts = enumerate(value)
        case _ if dataclasses.is_dataclass(value):
            parts = _attributes(value).items()
            left_out = {field.name for field in dataclasses.fields(value) if not field.init}
    found = {key: True if key in left_out else _at_default(part) for key, part in parts}
    return {key: each for key, each in found.items() if each}


@functools.lru_cache(_CACHED)
def _form_of(func: Func) -> tuple[inspect.Signature, Form]:
    """A signature, and the JSON object of its arguments: a key for each parameter, no other."""
    try:
        signature = signature_of(func)
    except ValueError:
        raise NotSerializable(f"{code_name(func)} has no signature, so its arguments cannot be stored") from None
    fields: Fields = {}
    for name, hint in _hints_of(func, signature).items():
        parameter = signature.parameters[name]
        is_required = parameter.default is parameter.empty and parameter.kind not in _VARIADIC
        fields[name] = hint if is_required else NotRequired[hint]
        try:
            _form({name: hint})
        except (PydanticUserError, TypeError, NameError) as error:
            reason = str(error).splitlines()[0]
            raise NotSerializable(f"{code_name(func)}: the argument {name!r} cannot be stored: {reason}") from None
    return signature, _form(fields)


def _hints_of(func: Func, signature: inspect.Signature) -> Fields:
    """The type that each parameter binds: `*args` a tuple, `**kwargs` a dictionary."""
    try:
        hints = _types_of(inspect.unwrap(func))
    except Exception as error:  # an annotation is any code
        raise NotSerializable(f"{code_name(func)}: its annotations cannot be read: {error}") from None
    bound: Fields = {}
    for name, parameter in signature.parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is parameter.VAR_POSITIONAL:
            hint = tuple.__class_getitem__((hint, ...))
        elif parameter.kind is parameter.VAR_KEYWORD:
            hint = dict.__class_getitem__((str, hint))
        bound[name] = hint
    return bound


def _types_of(func: Func) -> Fields:
    """The types of the parameters, even if only a type checker can read the return type."""
    try:
        return get_type_hints(func, include_extras=True)
    except Exception:
        if not inspect.isfunction(func):
            raise

    def parameters() -> None: ...

    parameters.__annotations__ = {name: hint for name, hint in annotations_of(func).items() if name != "return"}
    return get_type_hints(parameters, func.__globals__, include_extras=True)


def _form(fields: Mapping[str, object]) -> Form:
    make: Any = TypedDict  # whose keys are known only now
    # A union, because pydantic takes a configuration for anything but a class that could have its own.
    return TypeAdapter(make("Arguments", dict(fields)) | None, config=_CONFIG)


def _refusal(func: Func, signature: inspect.Signature, given: Mapping[str, object]) -> NotSerializable:
    """The error that names the argument at fault; built only if there is one."""
    hints = _hints_of(func, signature)
    for name, value in given.items():
        part = _form({name: hints[name]})
        if _round_trip(part, {name: value}) is not None:
            continue
        hint = hints[name]
        kind = "has no annotation" if hint is Any else f"is annotated as {getattr(hint, '__name__', hint)}"
        return NotSerializable(
            f"{code_name(func)}: the argument {name!r} of type {type(value).__qualname__} {kind}, and cannot be "
            f"stored: {_why(part, name, value)}; annotate it with its exact type, or pass plain JSON values"
        )
    return NotSerializable(f"{code_name(func)}: its arguments cannot be stored")


def _why(form: Form, name: str, value: object) -> str:
    """The first step that fails on the way to JSON and back; never an error's text, which may contain the value."""
    why = "pydantic cannot write it as JSON"
    try:
        form.dump_json({name: value}, warnings=False, round_trip=True, by_alias=True)
        why = "its annotation does not describe it"
        text = form.dump_json({name: value}, warnings="error", round_trip=True, by_alias=True)
        why = "its JSON is not accepted back"
        back = form.validate_json(text)[name]
        is_of_type = type(value) is type(back)
        why = "it would come back " + ("with another value" if is_of_type else f"as {type(back).__qualname__}")
        same(value, back)
    except RecursionError:
        return "it is nested too deeply, or contains itself"
    except ValidationError as error:
        return f"{why} ({error.errors()[0]['type']})"
    except Exception:  # of the app's, too
        return why
    return why
