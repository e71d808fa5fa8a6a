"""Recipes in sheets, and the experiments that name them: keys say what fields say, files what they are for."""

import re

import pytest

from helpers.configs import STUDIES, merged
from helpers.workflow_runs import snakemake
from obr.config.config_files import FOLDER, PROJECT, add_recipes, experiment_files, load_config
from obr.config.recipe_sheets import read_sheets
from obr.errors import ObrError

KEY = re.compile(
    r"(?P<method>[a-z_]+)-w(?P<bits>[\d.]+)(g(?P<group>\d+))?(s(?P<sparsity>[\d.]+)|p(?P<pattern>(paired)?\d+_\d+))?"
    r"(-(?P<rest>.+))?"
)
SHEETS = read_sheets(FOLDER / "recipes")
EXPERIMENTS = sorted((FOLDER / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("key", [key for key in SHEETS if key != "dense"])
def test_a_key_says_what_the_fields_say(config, key):
    recipe, said = config.parsed[key], KEY.fullmatch(key)
    assert said, key
    bits = recipe.allocation.bits if recipe.allocation else recipe.bits
    pattern = recipe.pattern and recipe.pattern.replace(" ", "").replace(":", "_")
    sparsity = f"{100 * recipe.sparsity:g}" if recipe.sparsity and not pattern else None
    assert said["method"] == recipe.method and said["bits"] == str(bits), key
    assert said["group"] == (str(recipe.group) if recipe.group else None), key
    assert (said["sparsity"], said["pattern"]) == (sparsity, pattern), key
    rotation, *variants = (said["rest"] or "none").split("-")
    if recipe.rotation == "none":
        assert rotation == "none" or rotation not in config.raw["rotations"], key
        variants = [rotation, *variants]
    else:
        assert rotation == recipe.rotation, key
    asymmetry = f"asym{100 * recipe.asymmetry:g}" if recipe.asymmetry else None
    for variant, there in {
        "cached": recipe.hessian == "cached" and recipe.calibration != "sotu",
        "refit": recipe.refit,
        "layer": recipe.scope == "layer",
        "gradient": recipe.row_weights == "gradient",
        "mixed": recipe.allocation is not None or recipe.calibration == "mixed",
        "c4": recipe.calibration == "c4",
        "sotu": recipe.calibration == "sotu",
        **{mask: recipe.chosen_mask == mask for mask in ("magnitude", "sparsegpt", "random")},
        f"heldout{recipe.held_out}": recipe.held_out > 0,
        "shrunk": recipe.target_shrinkage == "held_out",
        "tuned": (recipe.hessian_scope, recipe.clip) == ("block", "hessian"),
    }.items():
        assert (variant in variants) == there, (key, variant)
    assert [name for name in variants if name.startswith("asym")] == [asymmetry] * bool(asymmetry), key


@pytest.fixture(scope="module")
def config():
    return load_config()


def test_no_two_recipes_of_the_sheets_make_the_same_checkpoint(config):
    """Of the authors' own, which hold what their sources hold, and of the demo's, which are of another text, none."""
    made: dict[str, str] = {}
    for key in SHEETS:
        entry = config.weight_entry(key) + str(SHEETS[key].get("source"))
        assert made.setdefault(entry, key) == key, (key, made[entry])


def test_every_recipe_of_the_sheets_is_of_use():
    """In some table or figure of the experiments, the demo among them."""
    everything = load_config().raw | {"experiments": []}
    used = set()
    for names in (["paper", *STUDIES], ["demo"], ["peers"]):
        raw = merged(experiments=names)
        for entry in [*raw["tables"].values(), *raw["figures"].values()]:
            used |= {row if isinstance(row, str) else row.get("recipe") for row in entry.get("rows", [])}
    assert set(SHEETS) <= used and everything["recipes"].keys() >= used - {None}, set(SHEETS) - used


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "recipe\tmethod\tbits\na\trtn\tfour\n",
            r"sheet.tsv line 2: bits is 'four', which is not a whole number; corr",
        ),
        ("recipe\tmethod\trefit\na\trtn\tyes\n", r"line 2: refit is 'yes', which is not true or false"),
        ("recipe\tmethod\tsparse\na\trtn\t1\n", r"sheet.tsv has the unknown column 'sparse'; known are recipe, note"),
        ("recipe\tmethod\tactivations.bits\na\trtn\t4\n", r"unknown column 'activations.bits'"),
        ("recipe\tmethod\na\trtn\na\tgptq\n", r"line 3: recipe 'a' is there before; give each recipe one line"),
        ("recipe\tmethod\na\n", r"line 2 has 1 cells under 2 columns; separate them by tabs"),
        ("method\nrtn\n", r"has the columns method; give each once, recipe among them"),
        ("", r"give each once, recipe among them"),
        ("recipe\tmethod\tmethod\na\trtn\tgptq\n", r"recipe, method, method; give each once"),
    ],
)
def test_a_mistake_in_a_sheet_is_named_with_its_line(tmp_path, text, sentence):
    (tmp_path / "sheet.tsv").write_text(text)
    with pytest.raises(ObrError, match=sentence) as error:
        read_sheets(tmp_path)
    assert "\n" not in str(error.value)


def test_cells_have_the_types_of_their_fields(tmp_path):
    (tmp_path / "a.tsv").write_text(
        "recipe\tmethod\tbits\tsparsity\trefit\tgroup\tallocation_bits\tallocation_options\tsource\tsource_repo\tnote\n"
        "one\tjoint\t4\t0.5\ttrue\t\t3\tmixed\thub\ta/b\tfor readers\n"
        "two\tgptq\t3\t\tfalse\t128\t\t\t\t\t\n"
    )
    assert read_sheets(tmp_path) == {
        "one": {
            "method": "joint", "bits": 4, "sparsity": 0.5, "refit": True,
            "allocation": {"bits": 3.0, "options": "mixed"}, "source": {"source": "hub", "repo": "a/b"},
        },
        "two": {"method": "gptq", "bits": 3, "refit": False, "group": 128},
    }  # fmt: skip


def test_a_config_changes_fields_of_the_sheets_and_adds_recipes():
    key = "obr_gptq-w4s50-quarot"
    raw = {"recipes": {key: {"alpha": 0.25}, "own": {"method": "rtn"}}}
    add_recipes(raw)
    assert raw["recipes"][key] == {**SHEETS[key], "alpha": 0.25} and raw["recipes"]["own"] == {"method": "rtn"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_its_question_command_cost_and_where_it_is_written_up(path):
    lines = path.read_text().splitlines()[:4]
    starts = ("# Question: ", "# Command:  snakemake ", "# Cost:     ", "# Written up ")
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
    named = f"config/experiments/{path.stem}.yaml" in lines[1] or f"experiments=[{path.stem}]" in lines[1]
    assert named or path.stem == "paper", lines[1]
    for name in re.findall(r"(?:docs/|README)\S*?\.md", lines[3]):
        assert (PROJECT / name).is_file(), name


def test_an_unknown_experiment_is_named_with_those_that_there_are():
    assert [path.stem for path in experiment_files({"experiments": "joint"})] == ["joint"]
    with pytest.raises(ObrError, match=r"experiments is 'gone', which config/experiments does not define; .* paper"):
        experiment_files({"experiments": ["paper", "gone"]})


def test_the_settings_of_a_run_fit_a_screen():
    text = (PROJECT / "config.yaml").read_text()
    assert len(text.splitlines()) <= 60 and not re.search(r"^(recipes|tables|models):", text, re.M)


@pytest.mark.workflow
def test_commands_can_be_read_and_all_is_the_paper_alone(tmp_path):
    """Over the jobs of every experiment, no shell line has more than 2,000 characters, and nothing is an error."""
    tables, strict = set(), ("--strict-dag-evaluation", "cyclic-graph", "functions", "periodic-wildcards")
    for experiments, options in (([], ()), (["paper", *STUDIES], strict)):
        given = {"results": "results"} | ({"experiments": experiments} if experiments else {})
        shown = snakemake(tmp_path, given, "--dry-run", "--printshellcmds", *options).stdout
        assert not re.search(r"\w*(Exception|Error)\b", shown), shown[-3000:]
        commands = re.findall(r"^Shell command: (obr .*)$", shown, re.M)
        assert max(map(len, commands)) <= 2000, max(commands, key=len)
        tables.add(frozenset(re.findall(r"^Shell command: obr (?:table|figure) (\S+)", shown, re.M)))
        if not experiments:
            assert sum(command.startswith("obr compress") for command in commands) == 172
            assert not re.search(r"obr (learn-rotation|sensitivity|gradients|hessian|released) ", shown)
    assert {len(names) for names in tables} == {18, 42}
