"""Read YAML files; every error names file and line, and duplicate keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from roadseg.errors import ConfigError

_LARGEST = 1 << 64  # Python can't print numbers with thousands of digits, and no value needs them
# PyYAML raises more than YAMLError, for instance for `!!int ""`, `!!bool x`, `!!timestamp x`, 2020-13-45 and 3,000 "[".
_BROKEN = (ValueError, LookupError, AttributeError, OverflowError, RecursionError, yaml.YAMLError)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check for duplicate keys before merges (`<<`) are resolved: a key may override a merged one."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise ValueError(f"line {line} repeats the key {key.value[:60]!r} of line {first}")
            lines[key.tag, key.value] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if abs(value) >= _LARGEST:
            raise ValueError(f"line {node.start_mark.line + 1} holds a huge number")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_yaml(path: Path, todo: str) -> Any:
    """The content of a YAML file, None if empty. todo: advice if the file does not exist. Raises ConfigError.

    A key given twice in a mapping is an error with both lines; PyYAML would silently use the last one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), todo=todo) from None
    except IsADirectoryError:
        raise ConfigError("a folder", expected="a YAML file", where=str(path), todo=todo) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"not readable as YAML ({e or type(e).__name__})", where=str(path)) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text by the rules of `load_yaml`."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ConfigError("not readable as YAML (nested too deep)", where=where) from None
    except _BROKEN as e:
        raise ConfigError(f"not readable as YAML ({e or type(e).__name__})", where=where) from None
