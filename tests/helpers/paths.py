"""Where the tests find the project and their own files."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
FIXTURES = ROOT / "tests" / "fixtures"
PUBLISHED = ROOT / "workflow" / "published" / "results.csv"
