"""Push against a real folder store; evaluations are made up, since only the gate reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roadseg.errors import ArchiveError, DataError, GateRefused, PointerMoved, StoreError
from roadseg.push import stage
from roadseg.push.gate import Decision
from roadseg.push.stage import promote_by_hand, push
from roadseg.release.archive import Release, load_release
from roadseg.release.store.base import Champion, FolderStore
from tests.conftest import RGB, write_release


def release(folder: Path, number: int) -> tuple[Release, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_release(folder / f"{number}.tar.gz", weights=bytes([number]))
    return load_release(path), path


def evaluation(of: Release, miou: float) -> dict[str, Any]:
    return {
        "release": of.digest, "miou": miou, "pixel_accuracy": miou, "mean_accuracy": miou, "images": 3,
        "source": "test", "split": "val", "runtime": "r", "data_fingerprint": "d" * 64,
        "class_iou": {c.name: miou for c in RGB.trained},
        "classes": [{"name": c.name, "train_frequency": 0.3} for c in RGB.trained],
    }  # fmt: skip


class Made:
    """A store, and releases by number with the mIoU that they really have on the data."""

    def __init__(self, folder: Path) -> None:
        self.store = FolderStore(folder / "store")
        self.releases = {n: release(folder, n) for n in (1, 2, 3)}
        self.mious = {1: 0.5, 2: 0.6, 3: 0.55}
        self.asked: list[str] = []

    def digest(self, number: int) -> str:
        return self.releases[number][0].digest

    def evaluate(self, digest: str) -> dict[str, Any]:
        self.asked.append(digest)
        return next(evaluation(r, self.mious[n]) for n, (r, _) in self.releases.items() if r.digest == digest)

    def push(self, number: int, evaluate: Callable[[str], dict[str, Any]] | None = None) -> Decision:
        candidate, archive = self.releases[number]
        scores = evaluation(candidate, self.mious[number])
        return push(candidate, archive, scores, evaluate or self.evaluate, self.store, 0.01)

    def bytes(self) -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in self.store.folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_first_better_worse_and_the_same_again(made: Made) -> None:
    assert made.push(1).outcome == "promoted" and made.asked == []
    assert made.push(2).outcome == "promoted" and made.asked == [made.digest(1)]
    before = made.bytes()
    assert made.push(3).outcome == "refused" and made.bytes() == before  # a refused one leaves nothing
    assert made.push(2).outcome == "unchanged" and made.bytes() == before
    champion = made.store.champion()
    assert champion and (champion.digest, champion.previous, champion.serial) == (made.digest(2), made.digest(1), 2)


def test_the_champion_is_scored_again(made: Made) -> None:
    made.push(1)
    pointer = made.store.folder / "champion.json"
    told = json.loads(pointer.read_text())
    pointer.write_text(json.dumps({**told, "miou": 0.01}))  # what it says of itself
    made.mious[1] = 0.9  # what it is
    assert made.push(2).outcome == "refused" and made.asked == [made.digest(1)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StoreError("no release"), "can't be evaluated"),
        (ArchiveError("damaged"), "can't be evaluated"),
        (DataError("knows 19 classes"), "can't be compared"),
    ],
)
def test_a_champion_that_can_not_be_scored_stays(made: Made, error: Exception, said: str) -> None:
    made.push(1)
    before = made.bytes()

    def fails(digest: str) -> dict[str, Any]:
        raise error

    with pytest.raises(GateRefused, match=said):
        made.push(2, fails)
    assert made.bytes() == before


def test_a_moved_pointer_leads_to_a_new_decision(made: Made) -> None:
    made.push(1)

    def overtaken(digest: str) -> dict[str, Any]:
        if not made.asked:
            made.asked.append("overtaken")
            made.push(2)
        return made.evaluate(digest)

    assert made.push(3, overtaken).outcome == "refused"  # better than 1, but not than 2
    champion = made.store.champion()
    assert champion and champion.digest == made.digest(2) and made.asked[-1] == made.digest(2)


def test_retries_are_limited(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: object) -> None:
        raise PointerMoved("again")

    monkeypatch.setattr(FolderStore, "promote", moved)
    with pytest.raises(StoreError, match=f"changed {stage.ATTEMPTS} times"):
        made.push(1)


@pytest.mark.fault
def test_documents_missing_after_a_kill_are_added(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FolderStore.promote

    def killed(self: FolderStore, champion: Champion, replacing: Champion | None) -> None:
        real(self, champion, replacing)
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderStore, "promote", killed)
    with pytest.raises(KeyboardInterrupt):
        made.push(1)
    monkeypatch.undo()
    assert made.store.document(made.digest(1), "decision.json") is None
    assert made.push(1).outcome == "unchanged"
    late = json.loads(made.store.document(made.digest(1), "decision.json") or b"")
    assert late["outcome"] == "promoted" and "was stopped" in late["reason"]


def test_the_documents_lie_beside_the_archive(made: Made) -> None:
    decision = made.push(1)
    digest = made.digest(1)
    assert json.loads(made.store.document(digest, "evaluation.json") or b"")["miou"] == 0.5
    assert (made.store.document(digest, "card.md") or b"").startswith(b"# roadseg release " + digest[:12].encode())
    assert json.loads(made.store.document(digest, "decision.json") or b"") == json.loads(json.dumps(decision.to_json()))


def test_promote_by_hand_and_roll_back(made: Made, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no previous champion"):
        promote_by_hand(made.store, None, tmp_path)
    made.push(1)
    with pytest.raises(StoreError):
        promote_by_hand(made.store, None, tmp_path)
    made.push(2)
    back = promote_by_hand(made.store, None, tmp_path)
    assert (back.digest, back.miou, back.serial) == (made.digest(1), 0.5, 3)
    before = made.bytes()
    assert promote_by_hand(made.store, made.digest(1)[:8], tmp_path).serial == 3 and made.bytes() == before
    with pytest.raises(StoreError):  # a second rollback does not go forward again
        promote_by_hand(made.store, None, tmp_path)
    assert promote_by_hand(made.store, made.digest(2), tmp_path).digest == made.digest(2)


def test_two_rollbacks_go_back_two_champions(made: Made, tmp_path: Path) -> None:
    made.mious[3] = 0.9
    for number in (1, 2, 3):
        made.push(number)
    back = [promote_by_hand(made.store, None, tmp_path).digest for _ in range(2)]
    assert back == [made.digest(2), made.digest(1)]


def test_promote_by_hand_needs_an_evaluation(made: Made, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no evaluation.json") as caught:
        promote_by_hand(made.store, str(made.releases[3][1]), tmp_path)
    assert "the config and the workspace that trained it (--push.min-gain -1 if" in caught.value.todo
    assert "an archive alone can't be pushed, but evaluate, predict and serve take its path" in caught.value.todo
