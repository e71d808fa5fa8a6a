"""Check this package on one GPU in a budget of minutes, what matters most first, and keep whatever is found.

    python benchmarks/check_gpu.py                         # make check-gpu: ten minutes at most
    python benchmarks/check_gpu.py --dry-run               # the parts in their order, what each shows and may take
    python benchmarks/check_gpu.py --device cpu --small    # the same parts at sizes that take seconds, without a GPU

Each part is a process of its own (gpu_parts.py) and writes one CSV file and one log into the folder of the run.
parts.csv and summary.md are written anew before and after each part: Ctrl-C, a kill or the end of the budget leave
all that was found, and the summary names what was not reached. The exit status is 0 if all parts ran and passed.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gpu_parts import PARTS
from obr.runtime.files import atomic_write, write_text

BUDGET = 600.0  # seconds
LEAST = 5.0  # seconds that a part is worth starting with
GRACE = 3.0  # seconds for a part to write what it has, before it is killed
HERE = Path(__file__).resolve().parent


@dataclass
class Line:
    """One part in parts.csv. status: "waiting", "running", "passed", "failed", "cut short" or "not reached"."""

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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [Line(name) for name in chosen]
    try:
        run(lines, args)
    except Stopped as reason:
        report(lines, args, f"Stopped by {reason}.")
        return 130
    print((args.out / "summary.md").read_text(encoding="utf-8"))
    return 0 if all(line.status == "passed" for line in lines) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/check-gpu"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds in all: {BUDGET:g}")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    args = parser.parse_args()
    args.out = args.out.absolute()
    return args


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


def run(lines: list[Line], args: argparse.Namespace) -> None:
    """Run the parts in order while there is time; each line is filled in."""
    start = time.monotonic()
    for line in lines:
        left = args.budget - (time.monotonic() - start)
        if left < LEAST:
            line.status = "not reached"
            continue
        line.status = "running"
        report(lines, args, "Running.")
        print(f"{line.part} ...", flush=True)
        began = time.monotonic()
        try:
            line.status, line.found = _run_part(line.part, left, args)
        except Stopped:
            line.status, line.found = "cut short", _last_line(args.out / f"{line.part}.log")
            raise
        finally:
            line.seconds = round(time.monotonic() - began, 1)
        print(f"{line.part}: {line.status} in {line.seconds:.0f} s. {line.found}", flush=True)
    report(lines, args, f"Finished in {time.monotonic() - start:.0f} s.")


def _run_part(name: str, left: float, args: argparse.Namespace) -> tuple[str, str]:
    """(status, what it found) of a part in a process group of its own, which ends with the budget."""
    command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--out", str(args.out), "--device", args.device]
    command += ["--seconds", f"{left - GRACE:.0f}", *(["--small"] if args.small else [])]
    log = args.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = child.wait(left)
        except subprocess.TimeoutExpired:
            return "cut short", _last_line(log)
        finally:
            _end(child)
    return ("passed" if status == 0 else "failed"), _last_line(log)


def _end(child: subprocess.Popen) -> None:
    """End a part and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].strip()[:300] if lines else ""


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
    unseen = [line.part for line in lines if line.status in ("waiting", "not reached", "cut short")]
    text = [
        "# Check on a GPU", "", f"Device {args.device}, budget {args.budget:.0f} s. {state}", "",
        "| part | status | seconds | found |", "| :-- | :-- | --: | :-- |", *rows, "",
        f"Not reached or cut short: {', '.join(unseen)}." if unseen else "All parts ran to their end.", "",
        "Each part has its figures in PART.csv and its output in PART.log beside this file.", "",
    ]  # fmt: skip
    write_text("\n".join(text), args.out / "summary.md")


def _stop(number: int, frame) -> None:
    raise Stopped(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
