"""Runs commands of `obr` in processes that may be killed at a chosen moment: one import, a fork for each command.

    python tests/helpers/killable_commands.py

Reads one JSON object a line: {"arguments": [...], "log": path, "unfinished": folder of what an interrupted run
leaves, "kill": null or one of {"notes": k, "seconds": s}, {"renames": k}, {"moves": k, "folder": f}, {"removals": k,
"folder": f}}: s seconds after the k-th note in the unfinished folder (the first says whose it is, the others that a
block is finished), before the k-th renaming of a file, before the k-th of those into the folder f, before the k-th
removal of a file in f. Answers each with a line of JSON: {"status": of the process, as subprocess gives it,
"times": of the notes, none for one that was killed}. All seconds are the process's own of a processor, since other
work on the machine may make one run many times as long as another.
"""

import json
import os
import signal
import sys
import time

import torch
from transformers.models.llama import modeling_llama  # noqa: F401  what the commands would import

from obr.calibration import collect_hessians
from obr.checkpoints.released import stage as released
from obr.cli import main
from obr.compression import stage
from obr.runtime import code_digest


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


def time_notes(folder: str, kill: dict) -> list[float]:
    """The times of the notes in this folder, as they come; after one of them be killed, if `kill` says so.

    The signal is SIGPROF then, which nothing catches: as abrupt as SIGKILL, and the kernel minds the time.
    """
    times = []

    def hook(name: str, arguments: tuple) -> None:
        if (
            name == "os.rename"
            and os.path.dirname(path := os.fspath(arguments[1])) == folder
            and path.endswith("json")
        ):
            times.append(time.process_time())
            if kill.get("notes") == len(times):
                signal.setitimer(signal.ITIMER_PROF, kill["seconds"])

    sys.addaudithook(hook)
    return times


def run(arguments: list[str], log: str, unfinished: str, kill: dict | None) -> dict:
    kill = kill or {}
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        times = time_notes(unfinished, kill)
        for kind, event in (("renames", "os.rename"), ("moves", "os.rename"), ("removals", "os.remove")):
            if kind in kill:
                kill_before(event, kill[kind], kill.get("folder"))
        status = main.main(arguments)
        os.write(writing, json.dumps(times).encode())
        os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return {"status": os.waitstatus_to_exitcode(status), "times": json.loads(answer.read() or "[]")}


if __name__ == "__main__":
    for module in (stage, collect_hessians, released):  # once for all forks
        code_digest.digest(module.__name__.removeprefix("obr."))
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
