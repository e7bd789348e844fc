"""Config flags such as `--training.batch-size 4`: parsed by tyro, laid over the YAML, validated by pydantic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from roadseg.config.sections import Config, merge, near_key, read_yaml, validated
from roadseg.errors import UsageError

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo


def parse_flags(path: Path | None, flags: Sequence[str], prog: str, description: str) -> Config:
    """The config of a YAML file, overridden by flags such as `--training.batch-size 4`.

    Wrong values of file and flags are reported together. `--help` prints every flag with the
    file's values as defaults, and exits.
    """
    import tyro  # takes 0.2 s to import, which a server does not need

    raw = read_yaml(path) if path else {}
    base = _valid_part(raw)
    rules = tyro.constructors.ConstructorRegistry()
    rules.primitive_rule(_parse_leniently)
    parsed = tyro.cli(
        _mirror(Config),
        args=list(flags),
        default=_as_mirror(base),
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        registry=rules,
    )
    set_keys = [flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")]
    where = " and ".join([str(path)] * bool(path) + ["the flags"] * bool(set_keys)) or "the flags"
    return validated(merge(raw, _select(dataclasses.asdict(parsed), set_keys)), where)


def _parse_leniently(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Parse numbers, booleans and choices; keep an invalid word as text, so that pydantic reports it as for YAML."""
    from tyro.constructors import PrimitiveConstructorSpec

    origin: object = info.type_origin
    values = get_args(info.type) if origin is Literal else (True, False) if info.type is bool else ()
    choices = {str(value): value for value in values}
    if not choices and info.type not in (int, float):
        return None

    def read(words: list[str]) -> Any:
        try:
            return choices[words[0]] if choices else info.type(words[0])
        except (KeyError, ValueError):
            return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}" if choices else info.type.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value in values if choices else isinstance(value, info.type),
        str_from_instance=lambda value: [str(value)],
    )


def unknown_flag(words: list[str], command: str) -> UsageError:
    """The error for an unknown argument of `command`; suggests the section of a config key given without one."""
    flag = words[0].split("=")[0]
    near = near_key(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else ""
    flags = " or ".join(f"--{key.replace('_', '-')}" for key in near.split(" or ") if "." in key)
    return UsageError(
        f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}"
        + (f", perhaps you meant {flags}" if flags else ""),
        todo=f"{command} --help lists every flag",
    )


def _valid_part(raw: dict[str, Any]) -> Config:
    """The config of `raw` with defaults in place of invalid values; the flags' defaults come from it."""
    for _ in range(100):
        try:
            return Config.model_validate(raw)
        except ValidationError as e:
            for error in e.errors():
                raw = _without(raw, [str(part) for part in error["loc"]])
    return Config()


def _without(raw: dict[str, Any], loc: list[str]) -> dict[str, Any]:
    out = dict(raw)
    below = out.get(loc[0])
    if len(loc) > 1 and isinstance(below, dict) and loc[1] in below:
        out[loc[0]] = _without(below, loc[1:])
    else:
        out.pop(loc[0], None)
    return out


_mirrors: dict[type[BaseModel], type] = {}


def _mirror(model: type[BaseModel]) -> type:
    """A plain dataclass with the model's fields and no constraints: tyro parses, pydantic validates."""
    import tyro

    if model not in _mirrors:
        fields = []
        for name, field in model.model_fields.items():
            kind: Any = field.annotation
            if get_origin(kind) is dict or any(_is_section(part) for part in get_args(kind)):
                continue  # dicts and lists of sections can be set in YAML only
            if _is_section(kind):
                kind = _mirror(kind)
            elif get_origin(kind) in (UnionType, Union):  # drop pydantic's constraints, which tyro would print
                parts = (get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(kind))
                kind = Union[tuple(parts)]  # noqa: UP007
            fields.append((name, Annotated[kind, tyro.conf.arg(help=field.description)]))
        _mirrors[model] = dataclasses.make_dataclass(model.__name__, fields)
        _mirrors[model].__doc__ = model.__doc__
    return _mirrors[model]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _as_mirror(section: BaseModel) -> Any:
    names = [f.name for f in dataclasses.fields(_mirror(type(section)))]
    pairs = ((name, getattr(section, name)) for name in names)
    return _mirror(type(section))(**{n: _as_mirror(v) if isinstance(v, BaseModel) else v for n, v in pairs})


def _select(values: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The nested values at these dotted keys only."""
    out: dict[str, Any] = {}
    for key in keys:
        *sections, name = key.split(".")
        source, target = values, out
        for section in sections:
            source, target = source[section], target.setdefault(section, {})
        target[name] = source[name]
    return out
