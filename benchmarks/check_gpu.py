"""Check this package on one GPU in a budget of minutes, what matters most first, and keep whatever is found.

    python benchmarks/check_gpu.py                         # make check-gpu: ten minutes at most
    python benchmarks/check_gpu.py --dry-run               # the parts in their order, what each shows and may take
    python benchmarks/check_gpu.py --device cpu --small    # the same parts at sizes that take seconds, without a GPU
    python benchmarks/check_gpu.py --simulated --small     # on the simulated GPU of the tests; its times mean nothing

Each part is a process of its own (gpu_parts.py) and writes one CSV file and one log into the folder of the run.
parts.csv and summary.md are written anew before and after each part: Ctrl-C, a kill or the end of the budget leave
all that was found, and the summary names what was not reached. A part that takes much longer than it is thought to
take is ended, so that later ones have their time. The exit status is 0 if no part failed and all were reached.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gpu_parts import FOUND, PARTS, STATUSES
from obr.errors import ObrError
from obr.runtime.files import atomic_write, write_text
from obr.runtime.gpu import VISIBLE, visible_gpus

BUDGET = 600.0  # seconds
LEAST = 5.0  # seconds that a part is worth starting with
GRACE = 3.0  # seconds for a part to write what it has, before it is killed
SLACK = 2.0  # times the seconds that a part is thought to take: what it has at least, if the budget allows
SHARE = 60.0  # seconds that any part has, if the budget allows
HERE = Path(__file__).resolve().parent
SIMULATED = HERE.parent / "tests/helpers/simulated_gpu"  # makes "cuda" the simulated device in Python processes
MISSED = ("waiting", "running", "not reached", "cut short")


@dataclass
class Line:
    """One part in parts.csv. status: "waiting", "running", "not reached", or one of gpu_parts.STATUSES."""

    part: str
    status: str = "waiting"
    seconds: float | None = None
    found: str = ""


class Stopped(Exception):
    """Someone wants the run to end; the signal's name."""


def main() -> int:
    args = arguments()
    chosen = [name for name in PARTS if name in (args.only or PARTS)]
    if args.dry_run:
        print(plan(chosen, args))
        return 0
    try:
        environment = environment_of(args)
    except ObrError as error:
        print(error, file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _stop)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in chosen:  # of an earlier run, which is not to be taken for this one's
        for kind in ("csv", "log"):
            (args.out / f"{name}.{kind}").unlink(missing_ok=True)
    lines = [Line(name) for name in chosen]
    try:
        if args.simulated:
            Path(environment["TMPDIR"]).mkdir(exist_ok=True)
            print("The simulated device is built, once in 20 seconds.", flush=True)
            subprocess.run([sys.executable, "-c", "import torch"], env=environment, check=True)
        run(lines, args, environment)
    except Stopped as reason:
        report(lines, args, f"Stopped by {reason}.")
        return 130
    print((args.out / "summary.md").read_text(encoding="utf-8"))
    return 0 if all(line.status in ("passed", "left out") for line in lines) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/check-gpu"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds in all: {BUDGET:g}")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--simulated", action="store_true", help="on the tests' simulated GPU instead of a real one")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.simulated and args.device != "cuda":
        parser.error(f"--simulated makes up one device, cuda, and not {args.device}; leave --device out")
    return args


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """Variables of the parts, in which the chosen GPU is the only one; "cuda" is the first.

    Raises:
        ObrError: there is no such device.
    """
    paths = [str(HERE.parent / "workflow"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if args.simulated:  # a device of this run alone; Triton, where it is installed, interprets its kernels
        own = {"PYTHONPATH": os.pathsep.join([str(SIMULATED), *paths]), "TRITON_INTERPRET": "1"}
        return {**os.environ, **own, VISIBLE: "0", "TMPDIR": str(args.out / "work")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    kind, _, index = args.device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or args.device.startswith("cpu:"):
        raise ObrError(f"Device {args.device!r} is unknown; use cpu, cuda or cuda:N.")
    if kind == "cuda":
        visible = list(visible_gpus())
        if int(index or 0) >= len(visible):
            raise ObrError(
                f"Device {args.device!r} is not there, {len(visible)} NVIDIA GPUs are visible; "
                "use --simulated --small, or --device cpu --small."
            )
        environment[VISIBLE] = visible[int(index or 0)]
    return environment


def plan(chosen: list[str], args: argparse.Namespace) -> str:
    """The parts in order, with the seconds that each is thought to take on one card, and where the budget ends."""
    texts, total = [], 0.0
    for name in chosen:
        part = PARTS[name]
        reached = "" if total < args.budget else "  (after the budget, unless others are quicker)"
        total += part.seconds
        texts.append(
            f"{name:<15} about {part.seconds:>3.0f} s, {total:>4.0f} s in all{reached}\n{'':<15} {part.shows}"
        )
    head = f"{len(chosen)} parts on {args.device}, {args.budget:.0f} s at most, into {args.out}:"
    return "\n".join([head, *texts])


def run(lines: list[Line], args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run the parts in order while there is time; each line is filled in."""
    start = time.monotonic()
    for place, line in enumerate(lines):
        left = args.budget - (time.monotonic() - start)
        if left < LEAST:
            line.status = "not reached"
            continue
        line.status = "running"
        report(lines, args, f"Part {line.part} is running; if no process does, the run was killed in it.")
        print(f"{line.part} ...", flush=True)
        began = time.monotonic()
        try:
            line.status, line.found = _run_part(line.part, share(lines[place:], left), args, environment)
        except Stopped:
            line.status, line.found = "cut short", _found(args.out / f"{line.part}.log")
            raise
        finally:
            line.seconds = round(time.monotonic() - began, 1)
        print(f"{line.part}: {line.status} in {line.seconds:.0f} s. {line.found}", flush=True)
    report(lines, args, f"Finished in {time.monotonic() - start:.0f} s.")


def share(lines: list[Line], left: float) -> float:
    """Seconds that the first of these parts may take: what the later ones are not thought to need, of what is left.

    It has its own estimate twice, whatever the later ones need.
    """
    own, *later = (PARTS[line.part].seconds for line in lines)
    return min(left, max(SLACK * own, SHARE, left - sum(later)))


def _run_part(name: str, seconds: float, args: argparse.Namespace, environment: dict[str, str]) -> tuple[str, str]:
    """(status, what it found) of a part in a process group of its own, which is ended after so many seconds."""
    device = args.device.partition(":")[0]
    command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--out", str(args.out), "--device", device]
    command += ["--seconds", f"{seconds - GRACE:.0f}", *(["--small"] if args.small else [])]
    log = args.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)
    if status is None:
        return "cut short", f"Ended after {seconds:.0f} s. {_found(log)}".strip()
    if status < 0:
        return "failed", f"Ended by {signal.Signals(-status).name}. {_found(log)}".strip()
    return STATUSES.get(status, "failed"), _found(log)


def _end(child: subprocess.Popen) -> None:
    """End a part, which may write what it has, and all that it has started."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _found(log: Path) -> str:
    """The sentence with which a part ended; of one that could not say it, the last line of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    said = [line.removeprefix(FOUND) for line in lines if line.startswith(FOUND)] or lines
    return said[-1].strip()[:400] if said else ""


def report(lines: list[Line], args: argparse.Namespace, state: str) -> None:
    """Write parts.csv and summary.md as things stand."""
    with atomic_write(args.out / "parts.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    rows = [
        f"| {line.part} | {line.status} | {'' if line.seconds is None else f'{line.seconds:.0f}'} "
        f"| {line.found.replace('|', '/')} |"
        for line in lines
    ]
    text = [
        "# Check on a GPU", "", f"{_described(args)} {state}", "",
        "| part | status | seconds | found |", "| :-- | :-- | --: | :-- |", *rows, "", _verdict(lines), "",
        "Each part has its figures in PART.csv and its output in PART.log beside this file.", "",
    ]  # fmt: skip
    write_text("\n".join(text), args.out / "summary.md")


def _described(args: argparse.Namespace) -> str:
    """What the run is on, and what its figures are worth."""
    text = f"Device {args.device}, budget {args.budget:.0f} s."
    if args.simulated:
        text = text.replace(args.device, f"{args.device}, simulated on the CPU") + " Its times are the CPU's."
    return f"{text} Small sizes: times are of no worth." if args.small else text


def _verdict(lines: list[Line]) -> str:
    """Which parts failed, were missed and were left out, by name."""
    counts = {
        "Failed": [line.part for line in lines if line.status == "failed"],
        "Not reached or cut short": [line.part for line in lines if line.status in MISSED],
        "Left out": [line.part for line in lines if line.status == "left out"],
    }
    texts = [f"{what}: {', '.join(names)}." for what, names in counts.items() if names]
    return " ".join(texts) or "All parts ran to their end and passed."


def _stop(number: int, frame) -> None:
    """End the run once; what it does to end is not disturbed by further signals."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
