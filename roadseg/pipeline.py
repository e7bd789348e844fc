"""The five stages in order: keys, cache, the run record. The only place that knows all stages.

Stages are imported where they run, so that a command that needs no torch does not load it.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from roadseg.config import Config
from roadseg.errors import ConfigError, DataError, GateRefused, UsageError
from roadseg.files import lock, read_json, write_atomic, write_json
from roadseg.release.archive import Release, load_release
from roadseg.release.store import Store, open_store, resolve
from roadseg.train.place import Place, place
from roadseg.workspace import Output, Workspace

if TYPE_CHECKING:
    from roadseg.data.manifest import Manifest
    from roadseg.data.shards import Shards
    from roadseg.images import Limits
    from roadseg.push.gate import Decision
    from roadseg.train.inputs import Inputs
    from roadseg.train.words import Words

log = logging.getLogger(__name__)
_runs = itertools.count()  # of this process; all of a cluster count alike
Stage = Literal["ingest", "transform", "train", "evaluate", "push"]
STAGES: tuple[Stage, ...] = ("ingest", "transform", "train", "evaluate", "push")
HOLDOUT = "holdout"
RECORD = "run.json"
DATA_REPORT = "log/data_report.html"  # in ingest's output, and in the run's folder
CACHE = "cache"  # below the workspace: archives fetched from a remote store


@dataclass(frozen=True)
class RunResult:
    """What a run ended with. outputs: by stage; evaluation: content of metrics.json.

    Of several processes that train together only rank 0 has any of it.
    """

    outputs: dict[str, Output]
    folder: Path
    evaluation: dict[str, Any] | None = None
    decision: Decision | None = None
    release: Path | None = None


@dataclass
class _Run:
    """One run in the making; each stage's method needs those before it.

    folder: where the record of its outputs is kept up, so that `clean` leaves them alone, also when
    the run is still going or was killed; None for a single evaluation. words: to the other ranks, where
    a cluster's processes all run this.
    """

    config: Config
    workspace: Workspace
    folder: Path | None = None
    words: Words | None = None
    outputs: dict[str, Output] = field(default_factory=dict)

    def keep(self, stage: str, output: Output) -> Output:
        self.outputs[stage] = output
        if self.folder:
            record = self.folder / RECORD
            earlier = read_json(record)["outputs"] if record.exists() else {}  # later stages of the run before
            outputs = earlier | {
                s: {"stage": o.stage, "key": o.key, "content": o.content, "cached": o.cached}
                for s, o in self.outputs.items()
            }
            write_json(self.folder / RECORD, {"outputs": outputs, "config": self.config.model_dump(mode="json")})
        return output

    def ingest(self, only_splits: tuple[str, ...] = ()) -> Output:
        from roadseg.ingest.stage import VERSION, ingest, source_digest

        data = self.config.data
        if data.source == "town":
            only_splits = ()  # the whole of it is there or is rendered
        fields = {**data.key_fields(), "only_splits": only_splits}
        if data.source != "town":
            del fields["town"]
        root = self.root()
        inputs = {"source": source_digest(data, root)}
        output = self.workspace.make(
            "ingest", VERSION, fields, inputs, lambda work: ingest(data, root, work, only_splits, self.folder)
        )
        if self.folder and (output.folder / DATA_REPORT).exists():
            write_atomic(self.folder / Path(DATA_REPORT).name, (output.folder / DATA_REPORT).read_bytes())
        return self.keep("ingest", output)

    def root(self) -> Path:
        """Where the data lies. Raises ConfigError when it was not said, DataError when it is not there."""
        data = self.config.data
        if data.source == "mix":
            from roadseg.ingest.sources import mixed_root

            return mixed_root(data, self.workspace.path / CACHE / "mixes")
        if data.root is None and data.source not in ("town", "folder"):
            raise ConfigError(
                f"source {data.source} needs the folder it lies in", where="data.root", todo="pass --data.root FOLDER"
            )
        return data.root or Path()  # the town is rendered; a folder's YAML may name its folders itself

    def manifest(self, only_splits: tuple[str, ...] = ()) -> tuple[Manifest, Path, Limits]:
        """The checked frames, the root of their paths, and the limits under which they are read."""
        from roadseg.data.manifest import Manifest
        from roadseg.images import Limits

        folder = (self.outputs.get("ingest") or self.ingest(only_splits)).folder
        root = folder / "tree" if self.config.data.source == "town" else self.root()
        limits = Limits(self.config.data.max_file_bytes, self.config.data.max_image_pixels)
        return Manifest.load(folder), root, limits

    def transform(self) -> Output:
        from roadseg.transform.stage import VERSION, transform

        manifest, root, limits = self.manifest()
        settings = self.config.transform
        output = self.workspace.make(
            "transform",
            VERSION,
            settings.key_fields(),
            {"ingest": self.outputs["ingest"].content},
            lambda work: transform(settings, manifest, root, work, limits, self.config.data.workers),
            resumes=True,
        )
        return self.keep("transform", output)

    def train(self) -> Output:
        """By this process, or by as many as the config or the cluster says, of which this one then is rank 0."""
        from roadseg.train.job import do, job_of, processes
        from roadseg.train.launch import launch
        from roadseg.train.ranks import outside
        from roadseg.train.stage import train_candidate

        inputs, shards, key = self._training()
        together = False

        def build(work: Path) -> None:
            nonlocal together
            if self.words:
                self.words.tell("training")
                together = True
                do(outside(), job_of(self.config, shards(), inputs, work), self.words)
            elif (world := processes(self.config.training)) > 1:
                launch(do, (job_of(self.config, shards(), inputs, work),), world)
            else:
                init, teacher = (g.release if g else None for g in (inputs.init, inputs.teacher))
                train_candidate(self.config, shards(), work, init, teacher)

        output = self.workspace.make("train", *key, build, resumes=True)
        if self.words:
            self.words.finish(await_others=together)
        return self.keep("train", output)

    def follow(self) -> None:
        """What a rank other than 0 does: its part of the training, if there is one to be done, and no more.

        Returns when rank 0 has finished training; at once if its output is there. Raises what rank 0 failed with.
        """
        from roadseg.train.job import do, job_of
        from roadseg.train.ranks import outside

        inputs, shards, key = self._training()
        assert self.words is not None
        if self.workspace.find("train", *key):
            return
        if self.words.wait("training", "trained") == "training":
            with tempfile.TemporaryDirectory(prefix="roadseg-rank-") as work:  # it writes nothing there
                do(outside(), job_of(self.config, shards(), inputs, work), self.words)
            self.words.wait("trained")
        self.words.heard()

    def _training(self) -> tuple[Inputs, Callable[[], Shards], tuple[int, dict[str, Any], dict[str, str]]]:
        """What the train stage starts from, and what its key is made of."""
        from roadseg.train.inputs import training_inputs
        from roadseg.train.job import refuse_uneven
        from roadseg.train.stage import VERSION

        c = self.config
        world = self.words.here.world if self.words else max(c.training.gpus, 1)
        # First: what is wrong here is told before hours of data.
        refuse_uneven(c.training, world)
        inputs = training_inputs(c, lambda reference: find_release(c, self.workspace.path, reference))
        shards, content = self._shards()
        fields = {"model": c.model.key_fields(), "training": c.training.key_fields()}
        return inputs, shards, (VERSION, fields, {"transform": content, **inputs.digests})

    def _shards(self) -> tuple[Callable[[], Shards], str]:
        """What reads the shards to train from, and their content digest."""
        from roadseg.data.shards import Shards

        address = self.config.transform.shards
        if not address:
            output = self.transform()
            return lambda: self._whole_shards(output), output.content
        a = self.config.aws
        given = Shards.load(address, region=a.region, endpoint_url=a.endpoint_url)
        if damaged := given.damaged():
            raise DataError(
                f"{len(damaged)} of its shards are missing or damaged",
                where=f"transform.shards {address}",
                todo="copy them there again",
            )
        return lambda: given, given.content

    def _whole_shards(self, output: Output) -> Shards:
        """The shards, after those that fail their digest were made again."""
        from roadseg.data.shards import Shards
        from roadseg.transform.stage import rebuild

        shards = Shards.load(output.folder)
        if not shards.damaged():
            return shards
        lock_path, what = output.folder.with_suffix(".lock"), f"transform {output.key}"
        with lock(lock_path, what, wait=self.workspace.wait, say=log.warning):
            if damaged := shards.damaged():  # another run may have mended them meanwhile
                manifest, root, limits = self.manifest()
                rebuild(damaged, self.config.transform, manifest, root, shards, limits)
        return shards

    def evaluate(self) -> Output:
        self._scored_splits(self.manifest()[0].splits)  # what is wrong here is told before hours of training
        candidate = load_release(self.train().folder / "model.tar.gz")
        return self.keep("evaluate", self.evaluation_of(candidate))

    def evaluation_of(self, release: Release, only_splits: tuple[str, ...] = ()) -> Output:
        """The Evaluation of any release on this config's data."""
        from roadseg.evaluate.stage import VERSION, Images, evaluate
        from roadseg.inference.predictor import Predictor

        manifest, root, limits = self.manifest(only_splits)
        splits = self._scored_splits(manifest.splits)
        settings = self.config.evaluation
        predictor = Predictor(release, settings.threads)
        return self.workspace.make(
            "evaluate",
            VERSION,
            {**settings.key_fields(), "splits": splits, "runtime": predictor.runtime},
            {"release": release.digest, **{split: manifest.fingerprint(split) for split in splits}},
            lambda work: evaluate(predictor, Images(manifest, root, limits), splits, settings.scenes, work),
        )

    def _scored_splits(self, present: Sequence[str]) -> list[str]:
        split = self.config.data.split
        if split not in present:
            raise DataError(
                f"the data set has no split {split!r}",
                expected=f"one of {', '.join(present)}",
                where="data.split",
                todo="set data.split",
            )
        return [split] + [s for s in present if s == HOLDOUT and s != split]

    def push(self) -> Decision:
        from roadseg.push.stage import push, read_champion

        read_champion(self.store())  # likewise: a store that can't be read
        output = self.evaluate()
        archive = self.outputs["train"].folder / "model.tar.gz"

        def evaluate_champion(digest: str) -> dict[str, Any]:
            champion = load_release(self.store().fetch(digest, self.workspace.path / CACHE), digest)
            evaluation: dict[str, Any] = read_json(self.evaluation_of(champion).folder / "metrics.json")
            return evaluation

        evaluation = read_json(output.folder / "metrics.json")
        candidate = load_release(archive)
        return push(candidate, archive, evaluation, evaluate_champion, self.store(), self.config.push.min_gain)

    def store(self) -> Store:
        return store_of(self.config, self.workspace.path)


def run(
    config: Config,
    until: Stage = "push",
    *,
    workspace: Path | str = "workspace",
    name: str = "default",
    wait: bool = True,
) -> RunResult:
    """Run the stages up to `until`; what is there already is not made again.

    Under torchrun or on a SageMaker cluster every process calls this alike; see `RunResult`.

    Writes runs/<name>/run.json, and report.html once there is an Evaluation. Raises the exceptions
    of roadseg.errors; GateRefused, after everything is written, when the champion stays.
    """
    if until not in STAGES:
        raise UsageError(f"no stage {until!r}", expected=", ".join(STAGES))
    _refuse_spawned()
    workspace = Path(workspace)
    folder = run_folder(workspace, name)
    here = place()
    if here.world > 1:
        return _run_in_cluster(config, until, workspace, folder, here)
    return _run(_Run(config, Workspace(workspace, wait), folder), until, folder)


def _run_in_cluster(config: Config, until: Stage, workspace: Path, folder: Path, here: Place) -> RunResult:
    """As one of the processes that a launcher started: rank 0 runs, the others make its data and train with it.

    Locks are always waited for: mostly it is a sibling that holds one.
    """
    if config.training.gpus != 1:
        raise ConfigError(
            f"{config.training.gpus} in one of {here.world} processes that were started together",
            expected="1",
            where="training.gpus",
            todo="leave it out: torchrun or the cluster says how many there are",
        )
    this = _Run(config, Workspace(workspace), folder if here.main else None)
    if not here.main:
        logging.getLogger("roadseg").setLevel(logging.WARNING)  # rank 0 tells the rest
    if until not in ("ingest", "transform"):
        from roadseg.train.words import Words

        this.words = Words(here, f"run {next(_runs)}")
        with this.words.failures_told():
            if here.main:
                return _run(this, until, folder)
            this.follow()
    elif here.main:
        return _run(this, until, folder)
    else:
        getattr(this, until)()
    return RunResult({}, folder)


def _run(this: _Run, until: Stage, folder: Path) -> RunResult:
    steps: dict[str, Callable[[], Any]] = {s: getattr(this, s) for s in STAGES}
    result = evaluation = None
    try:
        result = steps[until]()
    finally:
        decision = result if until == "push" else None
        if "evaluate" in this.outputs:  # also when there is no champion that can be compared with
            evaluation = read_json(this.outputs["evaluate"].folder / "metrics.json")
            _report(this, folder, evaluation, decision)
    release = this.outputs["train"].folder / "model.tar.gz" if "train" in this.outputs else None
    finished = RunResult(this.outputs, folder, evaluation, decision, release)
    if decision is not None and decision.outcome == "refused":
        from roadseg.push.gate import table

        log.warning("%s", table(decision))
        raise GateRefused(
            f"the champion {(decision.champion or '')[:12]} stays: {decision.reason}",
            todo=f"see {folder / 'report.html'}",
        )
    return finished


def run_folder(workspace: Path, name: str) -> Path:
    """WORKSPACE/runs/NAME, made. Raises UsageError for a name that is a path: `clean` would not find it."""
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UsageError(f"{name!r}", expected="letters, digits, '.', '_' and '-'", where="--name")
    folder = workspace / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_spawned() -> None:
    """A worker process that runs its parent's script again would wait for its parent for ever."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            "a script without a __main__ guard was run again by one of its own worker processes",
            todo='put the call of roadseg below `if __name__ == "__main__":`',
        )


def evaluate_release(
    config: Config, reference: str = "champion", *, workspace: Path = Path("workspace"), wait: bool = True
) -> tuple[dict[str, Any], Path]:
    """Score any release on the config's data; only `data.split` needs to be there.

    Returns the content of metrics.json and the folder that holds it and report.html.
    """
    this = _Run(config, Workspace(workspace, wait))
    release = load_release(find_release(config, workspace, reference))
    output = this.evaluation_of(release, only_splits=(config.data.split,))
    return read_json(output.folder / "metrics.json"), output.folder


def dataset(config: Config, workspace: Path, wait: bool = True) -> tuple[Manifest, Path, Limits]:
    """The checked frames of the config's data, the root of their paths, and the limits to read them under."""
    return _Run(config, Workspace(workspace, wait)).manifest()


def store_of(config: Config, workspace: Path) -> Store:
    a = config.aws
    return open_store(config.store.url, workspace / "store", region=a.region, endpoint_url=a.endpoint_url)


def find_release(config: Config, workspace: Path, reference: str) -> Path:
    """The local archive of `champion`, a digest, its prefix, a path, or s3://.../releases/DIGEST/model.tar.gz."""
    if reference.startswith("s3://"):
        url, _, rest = reference.partition("/releases/")
        config = config.model_copy(update={"store": config.store.model_copy(update={"url": url})})
        reference = rest.split("/")[0] or "champion"
    return resolve(reference, store_of(config, workspace), workspace / CACHE)


def _report(this: _Run, folder: Path, evaluation: dict[str, Any], decision: Decision | None) -> None:
    """The run's report: the Evaluation with the training curves, augmented samples and decision."""
    from roadseg.evaluate.report import render
    from roadseg.evaluate.stage import read_scenes
    from roadseg.files import read_json_lines
    from roadseg.report.film import film

    best, worst = read_scenes(this.outputs["evaluate"].folder)
    train = this.outputs["train"].folder
    html = render(
        evaluation,
        best,
        worst,
        history=read_json_lines(train / "history.jsonl"),
        contact_sheet=(train / "contact_sheet.jpg").read_bytes(),
        timing=read_json_lines(train / "log" / "timing.jsonl"),
        pictures=film(train / "log" / "pictures"),
        decision=decision.to_json() if decision else None,
        title=f"roadseg run on {evaluation['source']}",
    )
    write_atomic(folder / "report.html", html.encode())
    if decision:
        write_json(folder / "decision.json", decision.to_json())
