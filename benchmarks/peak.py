"""Peak resident memory and wall-clock time of one stage, run as a process of its own, as the workflow runs it."""

import json
import subprocess
import sys

from obr.errors import ObrError

# Between us and the stage stands a small process: before a child becomes the stage it counts with the memory of the
# process that started it, which would be ours, torch and all.
WATCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"status": status, "seconds": time.perf_counter() - start, "bytes": peak * unit}))
"""


def run_stage(stage: str, *arguments: object) -> dict[str, float]:
    """Run `obr stage ...`: {"peak_mb": 10⁶ bytes, memory-mapped files included, "seconds"}.

    arguments: options in turn; dictionaries become JSON.

    Raises:
        ObrError: the stage failed; what it printed is in the message.
    """
    texts = [json.dumps(a) if isinstance(a, dict) else str(a) for a in arguments]
    command = [sys.executable, "-c", WATCH, sys.executable, "-m", "obr", stage, *texts]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    found = json.loads(done.stdout) if done.returncode == 0 else {"status": done.returncode}
    if found["status"]:
        raise ObrError(f"The stage {stage} failed under the benchmark: {done.stderr.strip()[-1000:]}")
    return {"peak_mb": found["bytes"] / 1e6, "seconds": found["seconds"]}
