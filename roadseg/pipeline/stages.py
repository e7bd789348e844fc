"""The five stages in order, each made from what those before it made: keys and cache.

Stages are imported where they run, so that a command that needs no torch does not load it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roadseg.config.sections import Config
from roadseg.data.manifest import HOLDOUT
from roadseg.errors import ConfigError, DataError
from roadseg.files import lock, read_json, write_atomic, write_json
from roadseg.pipeline.workspace import Output, Workspace
from roadseg.release.archive import Release, load_release
from roadseg.release.store.base import Store
from roadseg.release.store.resolve import CACHE, find_release, store_of

if TYPE_CHECKING:
    from roadseg.data.manifest import Manifest
    from roadseg.data.shards.index import Shards
    from roadseg.images.decode import Limits
    from roadseg.push.gate import Decision
    from roadseg.train.distributed.rendezvous import Words
    from roadseg.train.inputs import Inputs

log = logging.getLogger(__name__)
RECORD = "run.json"
DATA_REPORT = "log/data_report.html"  # in ingest's output, and in the run's folder


@dataclass
class Stages:
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
    _inputs: Inputs | None = None
    _looked_ahead: bool = False

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

        def build(work: Path) -> None:
            self.look_ahead()
            ingest(data, root, work, only_splits, self.folder)

        output = self.workspace.make("ingest", VERSION, fields, inputs, build)
        if self.folder and (output.folder / DATA_REPORT).exists():
            write_atomic(self.folder / Path(DATA_REPORT).name, (output.folder / DATA_REPORT).read_bytes())
        return self.keep("ingest", output)

    def root(self) -> Path:
        """Where the data lies. Raises ConfigError when it was not said, DataError when it is not there."""
        data = self.config.data
        if data.source == "mix":
            from roadseg.ingest.sources.select import mixed_root

            return mixed_root(data, self.workspace.path / CACHE / "mixes")
        if data.root is None and data.source not in ("town", "folder"):
            raise ConfigError(
                f"source {data.source} needs the folder it lies in", where="data.root", todo="pass --data.root FOLDER"
            )
        return data.root or Path()  # the town is rendered; a folder's YAML may name its folders itself

    def manifest(self, only_splits: tuple[str, ...] = ()) -> tuple[Manifest, Path, Limits]:
        """The checked frames, the root of their paths, and the limits under which they are read."""
        from roadseg.data.manifest import Manifest
        from roadseg.images.decode import Limits

        folder = (self.outputs.get("ingest") or self.ingest(only_splits)).folder
        root = folder / "tree" if self.config.data.source == "town" else self.root()
        limits = Limits(self.config.data.max_file_bytes, self.config.data.max_image_pixels)
        return Manifest.load(folder), root, limits

    def transform(self) -> Output:
        from roadseg.transform.stage import VERSION, transform

        manifest, root, limits = self.manifest()
        settings = self.config.transform

        def build(work: Path) -> None:
            self.look_ahead()
            transform(settings, manifest, root, work, limits, self.config.data.workers)

        inputs = {"ingest": self.outputs["ingest"].content}
        output = self.workspace.make("transform", VERSION, settings.key_fields(), inputs, build, resumes=True)
        return self.keep("transform", output)

    def train(self) -> Output:
        """By this process, or by as many as the config or the cluster says, of which this one then is rank 0."""
        inputs, shards, key = self._training()
        together = False

        def build(work: Path) -> None:
            from roadseg.train.checks.preflight import refuse_unexportable
            from roadseg.train.distributed.worker import processes
            from roadseg.train.stage import train_candidate

            nonlocal together
            refuse_unexportable(self.config)  # its data may have been there: nothing was looked at ahead
            world = processes(self.config.training, self.words.here.world if self.words else 1)
            if self.words:
                self.words.tell("training", f"{world} {self.workspace.key('train', *key)}")
                together = True
            if self.words or world > 1:
                self._train_together(inputs, shards(), work, world)
            else:
                init, teacher = (g.release if g else None for g in (inputs.init, inputs.teacher))
                train_candidate(self.config, shards(), work, init, teacher)

        output = self.workspace.make("train", *key, build, resumes=True)
        if self.words:
            self.words.finish(await_others=together)
        return self.keep("train", output)

    def trained(self) -> Output | None:
        """The finished training of this config, if it is there."""
        return self.workspace.find("train", *self._training()[2])

    def follow(self) -> None:
        """What a rank other than 0 does: its part of the training, if there is one to be done, and no more.

        Returns when rank 0 has finished training; at once if its output is there. Raises what rank 0 failed with.
        """
        from roadseg.train.distributed.worker import processes

        inputs, shards, key = self._training()
        assert self.words is not None
        if self.workspace.find("train", *key):
            if self.words.here.host:  # there the first one waits to be heard
                self.words.heard()
            return
        if self.words.wait("training", "trained") == "training":
            world = processes(self.config.training, self.words.here.world)
            self._refuse_another_training(world, self.workspace.key("train", *key))
            with tempfile.TemporaryDirectory(prefix="roadseg-rank-") as work:  # it writes nothing there
                self._train_together(inputs, shards(), Path(work), world)
            self.words.wait("trained")
        self.words.heard()

    def _refuse_another_training(self, world: int, key: str) -> None:
        """Raises ConfigError where this process is about to train otherwise than the first one told."""
        assert self.words is not None
        theirs, their_key = self.words.told("training").split()
        who = f"process {self.words.here.rank} of {self.words.here.world}"
        if world != int(theirs):
            raise ConfigError(
                f"{who} would start {world} to train, and the first one {theirs}",
                expected="as many on each machine",
                where="training.gpus",
                todo="say how many, or take machines of one kind",
            )
        if key != their_key:
            raise ConfigError(
                f"{who} would make the training {key}, and the first one {their_key}",
                expected="the same settings and the same data for all",
                where="the config and the data",
                todo="give all the same command and the whole of the data",
            )

    def _train_together(self, inputs: Inputs, shards: Shards, work: Path, world: int) -> None:
        """This process's part of the training, or that of the `world` processes that it starts here."""
        from roadseg.train.distributed.launch import launch
        from roadseg.train.distributed.process_group import HEARD_WITHIN_S, outside
        from roadseg.train.distributed.rendezvous import PeerLost
        from roadseg.train.distributed.worker import do, job_of

        job = job_of(self.config, shards, inputs, work, self.words.name if self.words else "")
        if world == 1:
            do(outside(), job, self.words)
            return
        if not self.words:
            launch(do, (job,), world)
            return
        self.words.meet()  # elastic's agents would not hear of a machine that failed before it came to this
        try:
            launch(do, (job,), world, self.words.here, self.words.name)
        except PeerLost as lost:
            if told := self.words.cause(HEARD_WITHIN_S):
                raise told from lost
            raise

    def _training(self) -> tuple[Inputs, Callable[[], Shards], tuple[int, dict[str, Any], dict[str, str]]]:
        """What the train stage starts from, and what its key is made of."""
        from roadseg.train.version import VERSION

        c, inputs = self.config, self.inputs()  # first: what is wrong with them is told before hours of data
        shards, content = self._shards()
        fields = {"model": c.model.key_fields(), "training": c.training.key_fields(), **self._ranks()}
        return inputs, shards, (VERSION, fields, {"transform": content, **inputs.digests})

    def _ranks(self) -> dict[str, int]:
        """How many ranks train, where that changes the result.

        Without sync-BN each normalises by its own images; with several micro-batches each cuts them from its own.
        """
        t, started = self.config.training, self.words.here.world if self.words else 1
        if t.sync_batch_norm and t.accumulate == 1:
            return {}
        here = t.gpus
        if not here:
            from roadseg.train.distributed.worker import processes

            here = processes(t, started)
        return {"ranks": started * here} if started * here > 1 else {}

    def inputs(self) -> Inputs:
        """The releases that training starts from and learns from. Raises ConfigError for what the ranks can't share."""
        from roadseg.train.distributed.environment import refuse_uneven
        from roadseg.train.inputs import training_inputs

        if self._inputs is None:
            c = self.config
            refuse_uneven(c.training, (self.words.here.world if self.words else 1) * max(c.training.gpus, 1))
            self._inputs = training_inputs(c, lambda reference: find_release(c, self.workspace.path, reference))
        return self._inputs

    def look_ahead(self) -> None:
        """Once its inputs were asked for, so that training is to come: raises ConfigError for what can't be, whatever
        the data, before any is made.
        """
        if self._inputs is None or self._looked_ahead:
            return
        from roadseg.train.checks.preflight import refuse_ahead

        init = self._inputs.init
        refuse_ahead(self.config, init.release if init else None, self.words.here.world if self.words else 1)
        self._looked_ahead = True

    def _shards(self) -> tuple[Callable[[], Shards], str]:
        """What reads the shards to train from, and their content digest."""
        from roadseg.data.shards.index import INDEX, Shards

        address = self.config.transform.shards
        if not address:
            output = self.transform()
            return lambda: self._whole_shards(output), output.content
        a = self.config.aws
        if not address.startswith("s3://") and not (Path(address) / INDEX).is_file():
            raise ConfigError(
                f"no {INDEX} in {address}",
                expected="a folder or s3:// address with a finished transform's shards",
                where="transform.shards",
                todo="check the path, or leave it out to have them made here",
            )
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
        from roadseg.data.shards.index import Shards
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
        self.inputs()  # what is wrong with them is told before hours of data,
        self._scored_splits(self.manifest()[0].splits)  # and with these before hours of training
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
