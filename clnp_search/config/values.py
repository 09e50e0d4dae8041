"""What a value of a sweep file may be: types whose validators say what is allowed, and the schema for editors knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    WithJsonSchema,
    model_validator,
)

from clnp_search.importing import IMPORT_PATH
from clnp_search.passwords import require_no_password
from clnp_search.records import margin_text
from clnp_search.tasks import SCENARIOS, kind_of


def _parse_share(value: Any) -> Any:
    """A percentage as the fraction that it is; all else stays."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            raise ValueError("write a percentage such as 0.05%, or a fraction such as 0.0005") from None
    return value


def _parse_margin(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0.5:
        raise ValueError(
            f"a bare number is a fraction of 1, so {value} would allow a loss of {value:.0%} of accuracy; "
            f"write '{value}%' if you mean percentage points"
        )
    if isinstance(value, str) and not value.strip().endswith("%"):
        raise ValueError("write a percentage such as 0.05%, or a fraction such as 0.0005")
    share = _parse_share(value)
    if isinstance(share, float) and share >= 0.5:  # written down, it would be a bare number
        raise ValueError("allowed: less than 50%")
    return share


def _check_spent(value: Any) -> Any:
    if value == "auto":
        return value
    value = _parse_margin(value) if not isinstance(value, str) or value.strip().endswith("%") else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("write a percentage such as 0.05%, a fraction such as 0.0005, or auto")
    return value


def _check_alpha(value: Any) -> Any:
    if isinstance(value, Mapping) and not _is_range(value) and value:
        return {str(pattern): _check_part(each) for pattern, each in value.items()}
    if isinstance(value, list | tuple) and value:
        return tuple(_check_part(each) for each in value)
    return _check_part(value)


def _check_part(value: Any) -> Any:
    if isinstance(value, Range) or _is_range(value):
        return Range.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(
            "write a number of 0 or more, a list with one for each layer and the head last, or one for each pattern "
            'of layer names, such as {"layer1.*": 1e-6, "*": 1e-5}; or, for each of them, {low: 1e-7, high: 1e-3}'
        )
    return float(value)


def _check_rate(value: Any) -> Any:
    if isinstance(value, Range) or _is_range(value):
        return Range.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError("write a number above 0; or, for random and optuna, {low: 1e-4, high: 1e-2}")
    return float(value)


def _is_range(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"low", "high"}


def _check_conv_layer(value: Any) -> Any:
    units = value.removeprefix("valid ").strip() if isinstance(value, str) and value.startswith("valid ") else value
    units = int(units) if isinstance(units, str) and units.isdecimal() and value != units else units
    if value != "pool" and (isinstance(units, bool) or not isinstance(units, int) or units < 1):
        raise ValueError("write a number of channels, `valid N` for N channels without padding, or `pool`")
    return f"valid {units}" if isinstance(value, str) and value != "pool" else value


def _parse_validation(value: Any) -> Any:
    value = _parse_share(value)
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError("write a number of samples, 1 or more, or a share of them such as 10% or 0.1")
    return value


def _check_scenario(name: str) -> str:
    if kind_of(name) is None:
        close = difflib.get_close_matches(name, SCENARIOS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"allowed: {', '.join(SCENARIOS)}, torchvision:NAME, package.module:function{hint}")
    return name


def require_different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Takes a list in which nothing is there twice; of margins, nothing that is written the same."""
    if len({margin_text(each) if isinstance(each, float) else each for each in values}) < len(values):
        raise ValueError("a value is there twice")
    return values


def list_or_one(item: Any, least: int = 1) -> BeforeValidator:
    """Takes a single value for a list of one; a list has so many at least."""

    def as_list(value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    return BeforeValidator(as_list, json_schema_input_type=item | Annotated[tuple[item, ...], Field(min_length=least)])


def or_empty(section: Any) -> BeforeValidator:
    """Takes the name of a section with nothing below it for one that is all defaults."""
    return BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=section | None)


# Strict: YAML has numbers of its own, and `true` is none of them. What a validator takes before it is parsed is said by
# its `json_schema_input_type`, so that the schema for editors takes the same.
Count = Annotated[int, Field(strict=True, ge=0)]
PositiveCount = Annotated[int, Field(strict=True, ge=1)]
NonNegative = Annotated[FiniteFloat, Field(strict=True, ge=0)]
Positive = Annotated[FiniteFloat, Field(strict=True, gt=0)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(require_no_password)]
_Percentage = Annotated[str, Field(pattern=r"^\s*\d+(\.\d*)?([eE][+-]?\d+)?\s*%\s*$")]
Margin = Annotated[
    float,
    Field(strict=True, ge=0, lt=1),
    BeforeValidator(_parse_margin, json_schema_input_type=Annotated[float, Field(ge=0, lt=0.5)] | _Percentage),
]
Spent = Annotated[
    float | Literal["auto"], BeforeValidator(_check_spent, json_schema_input_type=Margin | Literal["auto"])
]
Growth = Annotated[
    float,
    Field(strict=True, gt=0, le=10),
    BeforeValidator(_parse_share, json_schema_input_type=Annotated[float, Field(gt=0, le=10)] | _Percentage),
]
Validation = Annotated[
    int | float,
    BeforeValidator(
        _parse_validation,
        json_schema_input_type=PositiveCount | Annotated[float, Field(gt=0, lt=1)] | _Percentage,
    ),
]


class Section(BaseModel):
    """A mapping of a sweep file: frozen, without unknown keys; docstrings describe its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Range(Section):
    """Values to draw from, on a logarithmic scale."""

    low: Positive
    """The smallest."""
    high: Positive
    """The largest."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} is not below high: {self.high:g}")
        return self

    def rounded(self, value: float) -> float:
        """A value of it with four digits, which is what people want to read and type."""
        return min(self.high, max(self.low, float(f"{value:.4g}")))


Objective = Literal["accuracy", "sparsity"]
AlphaPart = float | Range
AlphaValue = AlphaPart | tuple[AlphaPart, ...] | dict[str, AlphaPart]
_AlphaInput = (
    NonNegative
    | Range
    | Annotated[tuple[NonNegative | Range, ...], Field(min_length=1)]
    | Annotated[dict[str, NonNegative | Range], Field(min_length=1)]
)
Alpha = Annotated[AlphaValue, BeforeValidator(_check_alpha, json_schema_input_type=_AlphaInput)]
Rate = Annotated[float | Range, BeforeValidator(_check_rate, json_schema_input_type=Positive | Range)]
ConvLayer = Annotated[
    PositiveCount | str,
    BeforeValidator(
        _check_conv_layer,
        json_schema_input_type=PositiveCount | Annotated[str, Field(pattern=r"^(pool|valid [1-9]\d*)$")],
    ),
]
ScenarioName = Annotated[
    str,
    AfterValidator(_check_scenario),
    WithJsonSchema({"anyOf": [{"enum": list(SCENARIOS)}, {"type": "string", "pattern": f"^{IMPORT_PATH}$"}]}),
]


def _class_name(value: Any) -> str:
    if isinstance(value, str) or type(value) is int:
        return str(value)
    raise ValueError("write this name in quotes, without which YAML reads another value")


ClassName = Annotated[str, BeforeValidator(_class_name, json_schema_input_type=str | int)]
ClassNames = Annotated[tuple[ClassName, ...], Field(min_length=1)]


def parts_of(alpha: AlphaValue) -> dict[str, AlphaPart]:
    """The numbers and ranges of an alpha, by name."""
    if isinstance(alpha, dict):
        return {f"alpha[{pattern}]": part for pattern, part in alpha.items()}
    return (
        {f"alpha[{index}]": part for index, part in enumerate(alpha)} if isinstance(alpha, tuple) else {"alpha": alpha}
    )


def alpha_parts(alpha: AlphaValue, layers: Sequence[str]) -> list[str]:
    """For each layer, the name of the part of an alpha that is its own, as in `SearchConfig.ranges`."""
    if isinstance(alpha, dict):
        return [f"alpha[{next(each for each in alpha if fnmatchcase(layer, each))}]" for layer in layers]
    return [f"alpha[{index}]" if isinstance(alpha, tuple) else "alpha" for index in range(len(layers))]
