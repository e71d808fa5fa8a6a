"""The audit of the lock files tells what is known, and never takes silence for safety."""

import json
import stat
import subprocess
import sys

import pytest

from helpers.paths import ROOT

WHOLE = {"name": "safe", "version": "1", "vulns": []}
BROKEN = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "odd", "skip_reason": "not found"}


@pytest.mark.parametrize(
    "said, status, told",
    [
        ([WHOLE], 0, "audit: 1 packages checked, 0 known vulnerabilities, 0 not checked."),
        ([WHOLE, BROKEN], 1, "bad 2: CVE-1, mended in 3"),
        ([WHOLE, UNKNOWN], 2, "odd was not checked: not found"),
        (None, 2, "the advisories of osv.dev could not be had, so nothing was checked (no network)."),
    ],
)
def test_audit_reports_findings_and_silence_of_pip_audit(tmp_path, said, status, told):
    """By a program that stands in for it, and is asked about both lock files."""
    answer = f"print({json.dumps(json.dumps({'dependencies': said}))})" if said else "sys.exit('no network')"
    asked = f"assert sys.argv.count('--requirement') == 2 and {str(ROOT / 'requirements.lock')!r} in sys.argv"
    program = tmp_path / "pip-audit"
    program.write_text(f"#!{sys.executable}\nimport sys\n{asked}\n{answer}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    run = subprocess.run([sys.executable, str(ROOT / "envs/audit.py"), str(program)], capture_output=True, text=True)
    assert run.returncode == status and told in run.stdout, run
