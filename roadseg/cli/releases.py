"""`roadseg releases`, `promote`, `rollback` and `deploy`: the releases in a store."""

from __future__ import annotations

import argparse

from roadseg.config.sections import Config


def release_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", default="champion", metavar="R", help="champion (default), a digest or a path")


def releases(a: argparse.Namespace, config: Config) -> int:
    from roadseg.release.store.resolve import store_of

    store = store_of(config, a.workspace)
    champion, past = store.champion(), store.history()
    mious = {c.digest: c.miou for c in past}
    for digest in store.releases():
        mark = "champion" if champion and champion.digest == digest else ""
        miou = f"mIoU {100 * mious[digest]:.2f} %" if digest in mious else ""
        print(f"{digest[:16]}  {mark:<8}  {miou}")
    print(f"\nhistory of {store.address}:" if past else f"no champion yet in {store.address}")
    for c in past:
        print(f"{c.serial:>4}  {c.promoted_at}  {c.digest[:16]}  mIoU {100 * c.miou:.2f} %")
    return 0


def promote_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="R", help="a digest or its prefix")


def promote(a: argparse.Namespace, config: Config) -> int:
    from roadseg.push.stage import promote_by_hand
    from roadseg.release.store.resolve import CACHE, store_of

    store = store_of(config, a.workspace)
    before = store.champion()
    champion = promote_by_hand(store, getattr(a, "release", None), a.workspace / CACHE)
    was = before.digest[:16] if before else "none"
    print(f"{'champion':<9} {champion.digest[:16]} (mIoU {100 * champion.miou:.2f} %), was {was}")
    return 0


def deploy_arguments(parser: argparse.ArgumentParser) -> None:
    release_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the requests without sending them")


def deploy(a: argparse.Namespace, config: Config) -> int:
    from roadseg.deploy.sagemaker import deploy
    from roadseg.release.store.resolve import store_of

    deploy(a.release, store_of(config, a.workspace), config.aws, dry_run=a.dry_run, say=print)
    return 0
