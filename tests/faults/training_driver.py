"""Starts `roadseg` over and over as a fork of one process that has imported it already; see training_runs.py.

Reads a line of JSON a request from stdin and answers each with one: {"start": arguments, "log": path,
"prelude": code that the child runs first} with {"pid": n}; {"poll": pid} with {"code": n or null}.
"""

from __future__ import annotations

import json
import os
import sys

import cv2
import torch


def child(arguments: list[str], log: str, prelude: str) -> None:
    os.setsid()
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(to, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 99
    try:
        exec(prelude, {})
        code = cli.main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the interpreter's end: what the parent would do there is not ours


if __name__ == "__main__":
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    from roadseg import cli
    from roadseg.train import stage  # noqa: F401  # so that no child has to import it

    children: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if not pid:
                child(request["start"], request["log"], request["prelude"])
            children[pid] = None
            answer = {"pid": pid}
        else:
            pid = request["poll"]
            if children[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer = {"code": children[pid]}  # type: ignore[dict-item]
        print(json.dumps(answer), flush=True)
