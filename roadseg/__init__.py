"""From a folder of road scenes to a segmentation model in production that you can trust.

The names of the public API are imported on first use, so that `import roadseg` loads neither torch
nor anything else that its user does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roadseg.version import __version__ as __version__

if TYPE_CHECKING:
    from roadseg.config.sections import Config, load_config
    from roadseg.inference.predict import predict
    from roadseg.inference.predictor import Predictor
    from roadseg.pipeline.run import RunResult, evaluate_release, run
    from roadseg.release.archive import load_release

__all__ = [
    "Config",
    "Predictor",
    "RunResult",
    "evaluate_release",
    "load_config",
    "load_release",
    "predict",
    "run",
]

_MODULES = {
    "Config": "roadseg.config.sections",
    "Predictor": "roadseg.inference.predictor",
    "RunResult": "roadseg.pipeline.run",
    "evaluate_release": "roadseg.pipeline.run",
    "load_config": "roadseg.config.sections",
    "load_release": "roadseg.release.archive",
    "predict": "roadseg.inference.predict",
    "run": "roadseg.pipeline.run",
}

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), *_MODULES])
