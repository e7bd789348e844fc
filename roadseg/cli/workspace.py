"""`roadseg config` and `roadseg clean`: show the config, free disk space in the workspace."""

from __future__ import annotations

import argparse
import json

from roadseg.config.sections import Config


def config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("show", "schema"), help="the resolved config as YAML, or its JSON schema")


def config(a: argparse.Namespace, config: Config) -> int:
    if a.what == "schema":
        print(json.dumps(Config.model_json_schema(), indent=1))
    else:
        import yaml

        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    return 0


def clean_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--remove", action="store_true", help="remove what is listed")


def clean(a: argparse.Namespace, config: Config) -> int:
    from roadseg.pipeline.workspace import leftovers, remove

    found = leftovers(a.workspace)
    for leftover in found:
        print(f"{leftover.size_bytes / 1e6:>10.1f} MB  {leftover.path}  ({leftover.why})")
        if a.remove:
            remove(leftover)
    total = sum(leftover.size_bytes for leftover in found) / 1e6
    if not found:
        print(f"nothing to remove in {a.workspace}")
    else:
        print(f"{total:>10.1f} MB  {'removed' if a.remove else 'can be removed: run again with --remove'}")
    return 0
