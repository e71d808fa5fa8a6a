"""The settings of stages on a command line: unknown ones are refused, and the help lists those of the schema."""

import pytest

from obr.cli.main import main
from obr.cli.parser import STAGES, parser
from obr.cli.stage_settings import SECTIONS, check_settings, settings_help
from obr.config.config_files import load_config
from obr.config.recipe_settings import parse_settings
from obr.errors import ObrError

WITH_SETTINGS = [name for name, (_, _, options) in STAGES.items() if {"settings", "weights"} & set(options.split())]


def test_every_stage_with_settings_lists_them():
    assert sorted(SECTIONS) == sorted(WITH_SETTINGS)
    for name in WITH_SETTINGS:
        assert len(settings_help(name).splitlines()) > 2, name


def test_the_help_of_a_stage_ends_with_the_keys_of_its_settings(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["calibrate", "--help"])
    said = capsys.readouterr().out
    assert "nsamples                 number of windows (default: 128)" in said and "generated.temperature" in said


def test_the_help_of_a_command_for_people_has_none(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["export", "--help"])
    assert "KEY=VALUE" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "entry", "sentence"),
    [
        ("calibrate", {"nsample": 16}, r"nsample is no setting of calibrate; did you mean nsamples\?"),
        ("calibrate", {"generated": {"temperatur": 1}}, r"generated\.temperatur is no setting"),
        ("kernels", {"shapes": [{"tokens": 1, "columns": 8, "rows": 8}, {"token": 1}]}, r"shapes\.0\.token is no"),
        ("download-model", {"source": {"source": "hub", "rep": "a/b"}}, r"source\.rep is no setting"),
        ("sensitivity", {"options": [{"method": "gptq", "bit": 4}]}, r"options\.0\.bit is no setting"),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_refused_with_the_nearest_one(command, entry, sentence):
    with pytest.raises(ObrError, match=sentence):
        check_settings(command, entry)


def test_an_unknown_setting_ends_the_command(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["download-text", "--settings", "pth=a.txt", "source=path", "--out", str(tmp_path / "t")])
    assert ended.value.code == 2 and "pth is no setting of download-text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "command"),
    [
        ("models", "download-model"), ("texts", "download-text"), ("calibrations", "calibrate"),
        ("rotations", "learn-rotation"), ("zero_shot", "download-task"),
    ],
)  # fmt: skip
def test_settings_of_every_entry_of_the_config_are_known(section, command):
    for entry in load_config().raw[section].values():
        check_settings(command, entry)


@pytest.mark.parametrize(
    ("command", "word", "sentence"),
    [
        ("calibrate", "reversed=False", "reversed: 'False' is not of type 'boolean'"),
        ("calibrate", "seqlen=64.0", "seqlen: 64.0 is not of type 'integer'; write it without a point"),
        ("calibrate", "seed=None", "seed: 'None' is not of type 'integer'"),
        ("calibrate", "nsamples=0", "nsamples: 0 is less than the minimum of 1"),
        ("generate", "generated.temperature=NaN", "generated.temperature: nan is not of type 'number'"),
        ("gradients", "seqlen=1", "seqlen: 1 is less than the minimum of 2"),
        ("sensitivity", "options.0.bits=9", "options.0.bits: 9 is not one of"),
        ("download-model", "dtype=fp16", "dtype: 'fp16' is not one of"),
    ],
)
def test_a_value_that_a_setting_does_not_take_is_refused(command, word, sentence):
    entry = parse_settings([word, *({"download-model": ["source.source=path", "source.path=x"]}.get(command, []))])
    entry |= {"options": [{"method": "gptq", **entry["options"][0]}]} if "options" in entry else {}
    with pytest.raises(ObrError) as error:
        check_settings(command, entry)
    assert sentence in str(error.value) and f"a setting of {command} cannot be" in str(error.value)


def test_a_key_of_json_that_stands_twice_is_refused():
    with pytest.raises(ObrError, match="'nsamples' is there twice"):
        parse_settings(['{"nsamples": 4, "nsamples": 2}'])


@pytest.mark.parametrize(
    "words", [["--threads", "0"], ["--threads", "-2"], ["--activations-memory", "nan"], ["--activations-memory=-1"]]
)
def test_numbers_of_threads_and_megabytes_are_checked(words, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["compress", "--recipe", "method=rtn", "--model", "m", "--out", str(tmp_path / "c"), *words])
    assert "is not a" in capsys.readouterr().err
