"""Arguments come back as they are, or are refused by name."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, PlainSerializer, PrivateAttr, RootModel, computed_field, field_validator

from aftertask import NotSerializable
from aftertask._encoding import LARGEST_RESULT, DoesNotFit, decode, encode, encode_result, same


class Colour(enum.Enum):
    """An enumeration."""

    RED = "r"


class Number(enum.IntEnum):
    """An enumeration of integers."""

    ONE = 1


class Open(BaseModel, extra="allow"):
    """A model that takes anything."""


class Counter(BaseModel):
    """A model with a private attribute."""

    _count: int = PrivateAttr(default=0)


class Coupon(BaseModel, extra="forbid"):
    """A model with aliases and properties."""

    order: int
    code: str | None = Field(None, alias="couponCode")
    label: str = Field("", serialization_alias="shown")
    rate: float = 1.0

    @computed_field
    def double(self) -> int:
        """A part of what is written for others, and none of the model."""
        return 2 * self.order

    @functools.cached_property
    def triple(self) -> int:
        """In the model's dictionary once it was read."""
        return 3 * self.order


class Named(BaseModel):
    """A model that is read by another name than it is written by."""

    code: str = Field("x", validation_alias="Code", serialization_alias="CODE")


class Either(BaseModel, populate_by_name=True):
    """A model that is written by an alias that it cannot be read by."""

    code: str = Field("x", serialization_alias="CODE")


class Raw(BaseModel):
    """A model with what JSON lacks."""

    data: bytes = b""
    rate: float = 0.0


@dataclasses.dataclass
class Circle:
    """A dataclass with a field of its own making, and a property."""

    radius: float
    area: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.area = 3 * self.radius**2

    @functools.cached_property
    def double(self) -> float:
        """In the dictionary once it was read."""
        return 2 * self.radius


class Order(BaseModel):
    """A model."""

    id: int
    at: dt.datetime
    lines: list[tuple[str, decimal.Decimal]] = []


@dataclasses.dataclass
class Point:
    """A dataclass."""

    x: float
    y: float


#: Decimals that are written as numbers of JSON.
Inexact = Annotated[decimal.Decimal, PlainSerializer(float)]


def takes(annotation: Any) -> Any:
    """A function with one argument of this type."""

    def function(value): ...  # type: ignore[no-untyped-def]

    function.__annotations__ = {"value": annotation} if annotation is not None else {}
    return function


def there_and_back(annotation: Any, value: object) -> Any:
    """What is decoded of an argument."""
    args, _ = decode(takes(annotation), encode(takes(annotation), (value,), {}))
    return args[0]


#: Annotations, and values that may or may not fit them.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    max_leaves=8,
)
CASES: dict[Any, st.SearchStrategy[Any]] = {
    None: JSON,
    Any: JSON | st.binary() | st.decimals() | st.uuids() | st.sets(st.integers()),
    int: st.integers() | st.booleans() | st.floats() | st.text(),
    float: st.floats() | st.integers(),
    bool: st.booleans() | st.integers(),
    str: st.text() | st.binary(),
    bytes: st.binary() | st.text(),
    decimal.Decimal: st.decimals() | st.floats(),
    uuid.UUID: st.uuids() | st.text(),
    dt.datetime: st.datetimes(timezones=st.none() | st.timezones()) | st.dates(),
    dt.date: st.dates() | st.datetimes(),
    dt.time: st.times(),
    dt.timedelta: st.timedeltas() | st.floats(),
    dt.datetime | str: st.datetimes() | st.text() | st.datetimes().map(str),
    Colour: st.sampled_from(Colour) | st.just("r"),
    Path: st.text(min_size=1).map(Path),
    set[int]: st.sets(st.integers() | st.booleans()),
    frozenset[str]: st.frozensets(st.text()),
    dict[int, float]: st.dictionaries(st.integers(), st.floats()),
    tuple[int, ...]: st.lists(st.integers()).map(tuple) | st.lists(st.integers()),
    list[bytes]: st.lists(st.binary()),
    Point: st.builds(Point, st.floats(), st.floats() | st.integers()),
    Order: st.builds(
        Order,
        id=st.integers(),
        at=st.datetimes(),
        lines=st.lists(st.tuples(st.text(), st.decimals(allow_nan=False, allow_infinity=False))),
    ),
}


@settings(deadline=None)  # each example builds a schema
@given(st.data())
def test_a_value_comes_back_as_it_is_or_is_refused(data: st.DataObject) -> None:
    """By type and value, whatever the annotation."""
    annotation = data.draw(st.sampled_from(list(CASES)))
    value = data.draw(CASES[annotation])
    function = takes(annotation)
    try:
        text = encode(function, (value,), {})
    except NotSerializable:
        return
    args, kwargs = decode(function, text)
    assert not kwargs and same(args[0], value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (None, {"a": [1, 2.5, None, True, "x"]}),
        (int, 2**80),
        (float, float("nan")),
        (float, float("-inf")),
        (float, -0.0),
        (bytes, b"\xff\x00"),
        (decimal.Decimal, decimal.Decimal("1.00")),
        (dt.datetime, dt.datetime(2026, 11, 28, 12, tzinfo=ZoneInfo("Europe/Berlin"))),
        (Order, Order(id=1, at=dt.datetime(2026, 1, 1), lines=[("tea", decimal.Decimal("2.50"))])),
        (Point, Point(1.0, 2.0)),
        (dict[uuid.UUID, set[Colour]], {uuid.UUID(int=1): {Colour.RED}}),
    ],
)
def test_what_an_annotation_describes_is_accepted(annotation: Any, value: Any) -> None:
    """Such a value is not refused."""
    assert same(there_and_back(annotation, value), value)


ITSELF: list[object] = []
ITSELF.append(ITSELF)
BERLIN = ZoneInfo("Europe/Berlin")
IN_THE_REPEATED_HOUR = dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN)  # in the hour that comes twice


@pytest.mark.parametrize("fold", [0, 1])
def test_a_datetime_in_the_repeated_hour_keeps_its_offset(fold: int) -> None:
    """By PEP 495 such a datetime equals none of another zone, not even its own instant."""
    value = IN_THE_REPEATED_HOUR.replace(fold=fold)
    back = there_and_back(dt.datetime, value)
    assert back.utcoffset() == value.utcoffset() == dt.timedelta(hours=2 - fold)
    assert back.replace(tzinfo=None) == value.replace(tzinfo=None, fold=0)
    assert there_and_back(list[dt.datetime], [value]) == [back]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (dt.datetime, dt.datetime(2026, 10, 25, 2, 30, fold=1)),
        (dt.time, dt.time(2, 30, fold=1)),
        (dt.time, dt.time(2, 30, tzinfo=BERLIN)),
    ],
)
def test_a_time_that_would_change_is_refused(annotation: Any, value: Any) -> None:
    """JSON has no second hour without an offset, and a time of day has none in a zone that changes its clocks."""
    with pytest.raises(NotSerializable, match="it would come back with another value"):
        encode(takes(annotation), (value,), {})


@pytest.mark.parametrize("value", [dt.time(1, 2, 3, 4), dt.time(1, 2, tzinfo=dt.UTC)])
def test_a_time_comes_back(value: dt.time) -> None:
    """With the offset it has."""
    assert same(there_and_back(dt.time, value), value)


def test_a_model_with_aliases_is_accepted() -> None:
    """Written by the names that it is read by, whichever those are."""
    coupon = Coupon(order=1, couponCode="X")
    assert coupon.triple == 3 and coupon.double  # type: ignore[truthy-function]
    back = there_and_back(Coupon, coupon)
    assert same(back, coupon) and back.code == "X" and back.triple == 3
    assert there_and_back(Either, Either(code="a")).code == "a"


def test_what_is_cached_is_no_part_of_a_dataclass() -> None:
    """A property that was read changes nothing; a field that is not given is made again, and compared."""
    circle = Circle(2.0)
    assert circle.double == 4.0
    assert same(there_and_back(Circle, circle), circle)
    with pytest.raises(NotSerializable, match="it would come back with another value"):
        encode(takes(Circle), (with_attribute(Circle(2.0), "area", 0.0),), {})


def test_the_type_that_is_returned_does_not_matter() -> None:
    """Such as one that only a type checker can read."""

    def function(value: int) -> Unknown: ...  # type: ignore[name-defined]  # noqa: F821

    assert decode(function, encode(function, (1,), {})) == ((1,), {})

    def other(value: Unknown) -> int: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(NotSerializable, match="its annotations cannot be read: name 'Unknown'"):
        encode(other, (1,), {})


def with_attribute(value: Any, name: str, part: object) -> Any:
    """The value, with an attribute set."""
    setattr(value, name, part)
    return value


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (set[tuple[float, ...]], {(1, 2)}),
        (set[tuple[int, ...]], {(True,)}),
        (set[frozenset[float]], {frozenset({1})}),
        (collections.deque[float], collections.deque([1])),
        (collections.deque[int], collections.deque([1], maxlen=2)),
        (collections.defaultdict[str, int], collections.defaultdict(lambda: 1, {"a": 1})),
        (Open, Open.model_validate({"y": Number.ONE})),
        (Counter, with_attribute(Counter(), "_count", False)),
        (Point, with_attribute(Point(1.0, 2.0), "label", "x")),
        (list[Inexact], [decimal.Decimal("1.00")]),
    ],
)
def test_a_change_inside_is_refused(annotation: Any, value: Any) -> None:
    """Such as a type deep within, or what no comparison by == shows."""
    with pytest.raises(NotSerializable, match="it would come back with another value"):
        encode(takes(annotation), (value,), {})


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (set[tuple[float, ...]], {(1.0, 2.0), (-0.0,)}),
        (collections.deque[float], collections.deque([1.0, float("nan")])),
        (collections.defaultdict[str, int], collections.defaultdict(int, {"a": 1})),
        (Open, Open.model_validate({"y": [1, {"z": None}]})),
        (Counter, Counter()),
    ],
)
def test_containers_and_models_come_back(annotation: Any, value: Any) -> None:
    """With all that they hold."""
    assert same(there_and_back(annotation, value), value)


@pytest.mark.parametrize(
    ("annotation", "value", "why"),
    [
        (None, decimal.Decimal(1), "would come back as str"),
        (None, (1, 2), "would come back as list"),
        (None, float("nan"), "would come back as str"),
        (int, True, "would come back as int"),
        (dt.datetime | str, "2026-01-01T00:00:00", "would come back as datetime"),
        (int, "x", "does not describe it"),
        (None, object(), "pydantic cannot write it as JSON"),
        (str, "\ud800", "pydantic cannot write it as JSON"),
        (Raw, Raw(data=b"\xff"), "pydantic cannot write it as JSON"),
        (Raw, Raw(rate=float("nan")), "its JSON is not accepted back (float_type)"),
        (Named, Named(Code="a"), "it would come back with another value"),
        (list, ITSELF, "pydantic cannot write it as JSON"),
        (contextlib.ExitStack, contextlib.ExitStack(), "cannot be stored"),
    ],
)
def test_what_would_change_is_refused_by_name(annotation: Any, value: Any, why: str) -> None:
    """The error names the function, the argument and why."""
    with pytest.raises(NotSerializable, match="'value'") as raised:
        encode(takes(annotation), (value,), {})
    assert why in str(raised.value) and "takes.<locals>.function" in str(raised.value)


def test_all_kinds_of_parameters() -> None:
    """Positional-only, defaults, any number of either, partials; also names that pydantic uses itself."""

    def function(model_config: int, /, copy: str = "c", *rest: float, _private: bool, **more: bytes) -> None: ...

    partly = functools.partial(function, 1, _private=True)
    args, kwargs = decode(function, encode(partly, ("x", 2.0, float("inf")), {"extra": b"\x80"}))
    assert args == (1, "x", 2.0, float("inf")) and kwargs == {"_private": True, "extra": b"\x80"}
    assert decode(function, encode(partly, (), {})) == ((1,), {"_private": True})


def test_parameters_may_have_any_name() -> None:
    """Also such that look like ours."""

    def numbered(p1: int, p0: str, model_config: float) -> None: ...

    text = encode(numbered, (1, "x"), {"model_config": 2.5})
    assert decode(numbered, text) == ((1, "x", 2.5), {})


def test_a_validator_that_breaks_is_no_surprise() -> None:
    """Neither when the task is added nor when it is run again: others wait behind it."""
    broken = False

    class Strict(BaseModel):
        id: int

        @field_validator("id")
        @classmethod
        def check(cls, value: int) -> int:
            if broken:
                raise KeyError(value)
            return value

    text = encode(takes(Strict), (Strict(id=1),), {})
    broken = True
    with pytest.raises(NotSerializable, match="the argument 'value' of type"):
        encode(takes(Strict), (Strict.model_construct(id=1),), {})
    with pytest.raises(DoesNotFit, match="KeyError"):
        decode(takes(Strict), text)


class Patch(BaseModel):
    """A change of a contact: what was not set stays as it is."""

    name: str | None = None
    phone: str | None = None
    tags: list[str] = []


class Cat(BaseModel):
    """One of a union."""

    kind: Literal["cat"] = "cat"
    name: str
    note: str | None = None


class Dog(BaseModel):
    """The other."""

    kind: Literal["dog"] = "dog"
    name: str
    note: str | None = None


class Event(BaseModel):
    """A model with a default made anew for each."""

    id: uuid.UUID = Field(default_factory=uuid.uuid4)
    patch: Patch = Patch()
    note: str | None = None
    copies: list[str] = Field(default_factory=list)


class Patches(RootModel[list[Patch]]):
    """A model that is a list."""


@dataclasses.dataclass
class Box:
    """A dataclass with a model."""

    patch: Patch


def changed_in_place() -> Patch:
    """A model whose default was changed, and not set."""
    patch = Patch(name="Ann")
    patch.tags.append("new")
    return patch


@pytest.mark.parametrize(
    "value", [Patch(), Patch(name="Ann"), Patch(name=None), Patch(name="Ann", phone=None, tags=[])]
)
def test_a_model_keeps_which_fields_were_set(value: Patch) -> None:
    """So that a PATCH that runs again does not wipe what was not in it."""
    assert there_and_back(Patch, value).model_dump(exclude_unset=True) == value.model_dump(exclude_unset=True)
    for annotation, holder in (
        (list[Patch], [value]),
        (dict[str, Patch | Order], {"a": value}),
        (Box, Box(value)),
        (Patches, Patches([value])),
    ):
        assert same(there_and_back(annotation, holder), holder)


@pytest.mark.parametrize("event", [Event(), Event(patch=changed_in_place()), Event(note="x")])
def test_a_default_that_is_not_the_same_again_counts_as_set(event: Event) -> None:
    """A default changed in place or made anew comes back as it is; what else was not set is still not set."""
    for annotation, value in (
        (Event, event),
        (list[Event], [event]),
        (tuple[Event, ...], (event,)),
        (collections.deque[Event], collections.deque([event])),
        (dict[int, Event], {1: event}),
    ):
        assert same(there_and_back(annotation, value), value)
    assert there_and_back(Event, event).model_fields_set == event.model_fields_set | {"id"}
    assert there_and_back(Patch, changed_in_place()).model_fields_set == {"name", "tags"}


def test_the_tag_of_a_union_may_count_as_set() -> None:
    """Nothing else tells which model it is."""
    for annotation in (Cat | Dog, Annotated[Cat | Dog, Field(discriminator="kind")]):
        for value in (Cat(name="a"), Dog(name="a")):
            back = there_and_back(annotation, value)
            assert same(back, value) and back.model_fields_set | {"kind"} == {"kind", "name"}


def test_fields_set_are_part_of_a_value() -> None:
    """A model that comes back with fields set that were not is another one, whatever pydantic's own comparison says."""
    assert Patch() == Patch(name=None) and not same(Patch(), Patch(name=None))


def test_a_call_that_cannot_be_made_is_refused() -> None:
    """As the call itself would be."""
    with pytest.raises(NotSerializable, match="missing a required argument: 'value'"):
        encode(takes(int), (), {})


def test_a_changed_signature_still_takes_what_fits_it() -> None:
    """A new parameter with a default does no harm; a renamed, removed or retyped one does."""

    def old(a: int, b: str) -> None: ...
    def wider(a: int, b: str, c: bool = False) -> None: ...
    def renamed(a: int, c: str) -> None: ...
    def removed(a: int) -> None: ...
    def retyped(a: int, b: dt.date) -> None: ...

    text = encode(old, (1, "x"), {})
    assert decode(wider, text) == ((1, "x"), {})
    for other in (renamed, removed, retyped):
        with pytest.raises(DoesNotFit):
            decode(other, text)


def test_a_new_parameter_before_those_by_position_has_its_default() -> None:
    """What was stored for `*args`, or for a parameter that has no name for callers, stays there."""

    def old(a: int, *args: int, **more: int) -> None: ...
    def new(a: int, b: int = 0, *args: int, **more: int) -> None: ...
    def old_by_position(a: int, c: int, /) -> None: ...
    def new_by_position(a: int, b: int = 0, c: int = 1, /) -> None: ...

    assert decode(new, encode(old, (1, 2, 3), {"x": 4})) == ((1, 0, 2, 3), {"x": 4})
    assert decode(new, encode(old, (1,), {"x": 4})) == ((1,), {"x": 4})
    assert decode(new_by_position, encode(old_by_position, (1, 2), {})) == ((1, 0, 2), {})


@pytest.mark.parametrize(
    "wrap", [list, tuple, collections.deque, lambda parts: {"rows": parts}, lambda parts: Box(parts)]
)
@pytest.mark.parametrize("make", [iter, lambda rows: (row for row in rows)])
def test_a_result_with_an_iterator_is_not_kept(wrap: Any, make: Any) -> None:
    """Whatever holds it, and it is not read."""
    rows = make([1, 2, 3])
    with pytest.raises(NotSerializable, match="cannot be kept: reading it would run it"):
        encode_result({"data": wrap([rows])})
    assert list(rows) == [1, 2, 3]


def test_a_result_of_many_parts_is_not_looked_through() -> None:
    """It is too large as JSON, too."""
    with pytest.raises(NotSerializable, match="more than 16384 parts"):
        encode_result([0] * (LARGEST_RESULT + 1))
    assert encode_result([0] * 1000) == str([0] * 1000).replace(" ", "")
    assert encode_result(Open.model_validate({"y": [Point(1.0, 2.0)]})) == '{"y":[{"x":1.0,"y":2.0}]}'


def test_a_result_is_small_json() -> None:
    """Anything else is not kept."""
    assert encode_result({"a": [1, b"x"]}) == '{"a":[1,"eA=="]}'
    with pytest.raises(NotSerializable, match="at most 16384"):
        encode_result("x" * LARGEST_RESULT)
    with pytest.raises(NotSerializable, match="of type object"):
        encode_result(object())
