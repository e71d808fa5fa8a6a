"""Are there known vulnerabilities in what the lock files install? Asks osv.dev by pip-audit.

    python envs/audit.py PIP_AUDIT

PIP_AUDIT: the program, in an environment of its own, which `make audit` makes. Exits with 0 if none is known, with 1
if some are, each on a line, and with 2 if not all could be asked: never with 0 where something was not checked.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.lock", "requirements.torch.lock")


def audit(program: str) -> tuple[int, list[str]]:
    """(exit status, lines to print)."""
    # Names and versions alone are sent: nothing is resolved, downloaded or built.
    command = [program, "--no-deps", "--disable-pip", "--format", "json", "--vulnerability-service", "osv"]
    command += [part for name in LOCKS for part in ("--requirement", str(ROOT / name))]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        return 2, [f"audit: the advisories of osv.dev could not be had, so nothing was checked ({said[-1][:300]})."]
    skipped = [f"{p['name']} was not checked: {p['skip_reason']}" for p in packages if "skip_reason" in p]
    found = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version yet'}"
        for p in packages
        for v in p.get("vulns", [])
    ]
    count = len(packages) - len(skipped)
    told = f"audit: {count} packages checked, {len(found)} known vulnerabilities, {len(skipped)} not checked."
    return (1 if found else 2 if skipped else 0), [*found, *skipped, told]


if __name__ == "__main__":
    status, lines = audit(sys.argv[1])
    print("\n".join(lines))
    sys.exit(status)
