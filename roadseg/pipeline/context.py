"""Context of a run: config, workspace, run folder and cluster, shared by all stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from roadseg.config.sections import Config
from roadseg.files import read_json, write_json
from roadseg.pipeline.workspace import Output, Workspace
from roadseg.release.store.base import Store
from roadseg.release.store.resolve import CACHE, store_of
from roadseg.train.distributed.environment import ALONE, Cluster

RECORD = "run.json"


@dataclass(frozen=True, kw_only=True)
class Context:
    """folder: of the run, where the record of its outputs is kept up to date; None for a single evaluation.

    cluster: this process among those that torchrun started. run: name of this run, equal on all of them.
    """

    config: Config
    workspace: Workspace
    folder: Path | None = None
    cluster: Cluster = ALONE
    run: str = ""

    @property
    def cache(self) -> Path:
        return self.workspace.path / CACHE

    @property
    def store(self) -> Store:
        return store_of(self.config, self.workspace.path)

    def record(self, stage: str, output: Output) -> Output:
        """Name `output` in the run's record, so that `clean` keeps it, also if the run is killed."""
        if self.folder:
            path = self.folder / RECORD
            outputs = read_json(path)["outputs"] if path.exists() else {}  # later stages of the run before
            outputs[stage] = {
                "stage": output.stage,
                "key": output.key,
                "content": output.content,
                "cached": output.cached,
            }
            write_json(path, {"outputs": outputs, "config": self.config.model_dump(mode="json")})
        return output
