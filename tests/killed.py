"""Runs commands of `obr` in processes that may be killed at a chosen moment: one import, a fork for each command.

    python tests/killed.py

Reads one JSON object a line: {"arguments": [...], "log": path, "sign": path, "kill": null or one of
{"seconds": s}, {"renames": k}, {"moves": k, "folder": f}, {"removals": k, "folder": f}}: s seconds after the file
`sign` was there, before the k-th renaming of a file, before the k-th of those into the folder f, before the k-th
removal of a file in f. Answers each with a line of JSON: {"status": of the process, as subprocess gives it,
"seconds": it took after the sign}.
"""

import json
import os
import signal
import sys
import time

import torch
from transformers.models.llama import modeling_llama  # noqa: F401  what the commands would import

from obr import cli, compression, digest, hessian


def kill_before(event: str, count: int, folder: str | None) -> None:
    """SIGKILL this process before its `count`-th event of this kind; folder: of the path made or removed."""
    seen = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name != event or (folder and os.path.dirname(os.fspath(arguments[name == "os.rename"])) != folder):
            return
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(arguments: list[str], log: str, sign: str, kill: dict | None) -> dict:
    started = None
    child = os.fork()
    if not child:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        for kind, event in (("renames", "os.rename"), ("moves", "os.rename"), ("removals", "os.remove")):
            if kill and kind in kill:
                kill_before(event, kill[kind], kill.get("folder"))
        os._exit(cli.main(arguments))
    limit = kill["seconds"] if kill and "seconds" in kill else float("inf")
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if started is None and os.path.exists(sign):
            started = time.monotonic()
        elapsed = time.monotonic() - started if started else 0.0
        if ended:
            return {"status": os.waitstatus_to_exitcode(status), "seconds": elapsed}
        if elapsed > limit:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


if __name__ == "__main__":
    for module in (compression, hessian):  # once for all forks
        digest.digest(module.__name__.removeprefix("obr."))
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
