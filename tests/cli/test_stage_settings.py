"""The settings of stages on a command line: unknown ones are refused, and the help lists those of the schema."""

import pytest

from obr.cli import main
from obr.cli.parser import STAGES, parser
from obr.cli.stage_settings import SECTIONS, check_settings, settings_help
from obr.config.config_files import load_config
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
        main.main(["download-text", "--settings", "pth=a.txt", "source=path", "--out", str(tmp_path / "t")])
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
