"""Stage 5: compare the candidate with the champion and move the pointer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from roadseg.errors import ArchiveError, DataError, GateRefused, PointerMoved, StoreError
from roadseg.files import sha256_file
from roadseg.push.gate import Decision, decide
from roadseg.release.archive import Release
from roadseg.release.card import card
from roadseg.release.store.base import CARD, DECISION, EVALUATION, Champion, Store, read_document, stamp
from roadseg.release.store.resolve import resolve

ATTEMPTS = 20


def push(
    candidate: Release,
    archive: Path,
    evaluation: dict[str, Any],
    evaluate_champion: Callable[[str], dict[str, Any]],
    store: Store,
    min_gain: float,
) -> Decision:
    """Promote the candidate if the gate allows it. The champion is evaluated again; its stored score is not used.

    evaluate_champion(digest): its Evaluation on the candidate's data. If another push moves the
    pointer meanwhile, the decision is made again. A refused candidate is not put in the store.
    Raises GateRefused when the champion can't be read or compared, StoreError when the store fails.
    """
    for _ in range(ATTEMPTS):
        champion = read_champion(store)
        if champion and champion.digest == candidate.digest:
            decision = decide(evaluation, evaluation, min_gain)
            _complete(store, archive, candidate, evaluation, champion, min_gain)
            return decision
        decision = decide(evaluation, _evaluate(champion, evaluate_champion), min_gain)
        if decision.outcome == "refused":
            return decision
        store.publish(archive, _documents(candidate, evaluation))
        try:
            store.promote(_successor(candidate.digest, evaluation, champion), champion)
        except PointerMoved:
            continue
        store.publish(archive, {DECISION: _json(decision.to_json())})
        return decision
    raise StoreError(f"the champion changed {ATTEMPTS} times while deciding", where=store.address, todo="push again")


def read_champion(store: Store) -> Champion | None:
    """The champion, or None if there never was one. Raises GateRefused when the store can't be read."""
    try:
        return store.champion()
    except StoreError as e:
        raise GateRefused(
            f"the champion can't be read ({e})", todo="repair the store first; nothing was overwritten"
        ) from e


def _evaluate(champion: Champion | None, evaluate_champion: Callable[[str], dict[str, Any]]) -> dict[str, Any] | None:
    if champion is None:
        return None
    try:
        return evaluate_champion(champion.digest)
    except (StoreError, ArchiveError) as e:
        raise GateRefused(
            f"the champion {champion.digest[:12]} can't be evaluated ({e})",
            todo="repair or roll back the champion first; nothing was overwritten",
        ) from e
    except DataError as e:  # the candidate was scored on this data, so the champion does not fit it
        raise GateRefused(
            f"the champion {champion.digest[:12]} can't be compared on this data ({e.found})",
            expected=e.expected,
            todo="choose another store by store.url; nothing was overwritten",
        ) from e


def _complete(
    store: Store, archive: Path, candidate: Release, evaluation: dict[str, Any], champion: Champion, min_gain: float
) -> None:
    """Write the documents that a push killed right after moving the pointer left out."""
    if store.document(candidate.digest, DECISION) is None:
        late = decide(evaluation, None, min_gain)
        reason = f"promoted at {champion.promoted_at} by a push that was stopped before it wrote its decision"
        documents = _documents(candidate, evaluation) | {DECISION: _json(replace(late, reason=reason).to_json())}
        store.publish(archive, documents)


def _successor(digest: str, evaluation: dict[str, Any], champion: Champion | None) -> Champion:
    serial, previous = (champion.serial + 1, champion.digest) if champion else (1, "")
    return Champion(digest, evaluation["miou"], evaluation["data_fingerprint"], serial, previous, stamp())


def _documents(candidate: Release, evaluation: dict[str, Any]) -> dict[str, bytes]:
    return {EVALUATION: _json(evaluation), CARD: card(candidate, evaluation).encode()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def promote_by_hand(store: Store, reference: str | None, cache: Path) -> Champion:
    """Make a release champion without the gate: `reference`, or the previous champion if None.

    Its mIoU is taken from its last time as champion, else from its evaluation.json in the store. Two
    rollbacks go back two champions. Raises StoreError when there is no such release or no previous
    champion.
    """
    now, is_rollback = store.champion(), reference is None
    if reference is None:
        if now is None or not now.previous:
            raise StoreError("there is no previous champion", where=store.address, todo="see `roadseg releases`")
        reference = now.previous
    digest = sha256_file(resolve(reference, store, cache))
    if now and digest == now.digest:
        return now  # a second entry would make it its own predecessor and break rollback
    past = next((c for c in reversed(store.history()) if c.digest == digest), None)
    champion = _successor(digest, _stored_evaluation(store, digest, past), now)
    if is_rollback and past:
        champion = replace(champion, previous=past.previous)
    store.promote(champion, now)
    return champion


def _stored_evaluation(store: Store, digest: str, past: Champion | None) -> dict[str, Any]:
    if past:
        return {"miou": past.miou, "data_fingerprint": past.data_fingerprint}
    evaluation = read_document(store, digest, EVALUATION)
    if evaluation is None:
        raise StoreError(
            f"release {digest[:12]} has no {EVALUATION}",
            expected="a release that `roadseg push` stored",
            where=store.address,
            todo="push with the config and the workspace that trained it (--push.min-gain -1 if the gate refuses it); "
            "an archive alone can't be pushed, but evaluate, predict and serve take its path as --release",
        )
    return evaluation
