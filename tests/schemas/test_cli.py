"""Settings from a file, the environment and the command line."""

import pickle

import pytest
import yaml
from pydantic import BaseModel

from schemas import ErrorCode, PlanSettings, RowError, TransferSettings, cli

NEEDED = ["--manifest", "m", "--output", "o"]


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "settings.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return ["--settings", str(path)]

    return write


def refused(capsys, argv, cls=TransferSettings):
    """The lines that a wrong command line prints; its exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        cli.load(cls, argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(file, monkeypatch):
    settings = file({"limits": {"row_seconds": 1, "max_frames": 11}, "transfer": {"batch_rows": 7}})
    monkeypatch.setenv("VMT_LIMITS__ROW_SECONDS", "2")
    monkeypatch.setenv("VMT_LIMITS__MAX_PIXELS", "12")
    loaded = cli.load(TransferSettings, [*NEEDED, *settings, "--limits.row-seconds", "3"])
    assert loaded.limits.row_seconds == 3
    assert loaded.limits.max_pixels == 12
    assert loaded.limits.max_frames == 11
    assert loaded.transfer.batch_rows == 7
    assert loaded.encode.actors == 1


@pytest.mark.parametrize("flag", ["--limits.row-seconds", "--limits.row_seconds"])
@pytest.mark.parametrize("joined", [True, False])
def test_both_spellings_of_a_flag(flag, joined):
    words = [f"{flag}=5"] if joined else [flag, "5"]
    assert cli.load(TransferSettings, [*NEEDED, *words]).limits.row_seconds == 5


def test_lists_are_comma_separated():
    argv = ["--references", "r", "--prompts", "p", "--output", "o", "--methods", "fastvmt, none", "--seeds", "0,1,2"]
    loaded = cli.load(PlanSettings, argv)
    assert loaded.methods == ("fastvmt", "none")
    assert loaded.seeds == (0, 1, 2)


def test_flags_that_others_build_on():
    plan = [
        "--references",
        "r",
        "--prompts",
        "p",
        "--output",
        "o",
        "--model",
        "wan-nano",
        "--methods",
        "none",
        "--seeds",
        "0",
    ]
    assert cli.load(PlanSettings, [*plan, "--skip-bad"]).skip_bad
    loaded = cli.load(TransferSettings, [*NEEDED, "--model", "wan-nano", "--limit", "3", "--retry-failed"])
    assert (loaded.limit, loaded.retry_failed) == (3, True)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([*NEEDED, "--limits.row-secs", "5"], "limits.row-secs"),
        ([*NEEDED, "--limits.row-seconds", "soon"], "limits.row_seconds: Input should be a valid number"),
        ([*NEEDED, "--transfer.actors", "0"], "transfer.actors: Input should be greater than 0"),
        ([*NEEDED, "--transfer.actors", "3", "--transfer.max-actors", "2"], "max_actors=2 is less than actors=3"),
        (["--output", "o"], "manifest: required"),
        ([*NEEDED, "--settings", "nowhere.yaml"], "nowhere.yaml: No such file"),
        ([*NEEDED, "--settings"], "--settings: expected a file"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_field(capsys, argv, line):
    lines = refused(capsys, argv)
    assert len(lines) == 1
    assert line in lines[0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"limits": {"row_second": 5}}, "limits.row_second: no such setting; did you mean row_seconds?"),
        ({"modle": "x"}, "modle: no such setting; did you mean model?"),
        ({"limits": {"row_seconds": "soon"}}, "limits.row_seconds"),
        ("a: [1", "not YAML"),
        ("- a\n- b", "expected a mapping of settings, found a list"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_field(capsys, file, content, line):
    lines = refused(capsys, [*NEEDED, *file(content)])
    assert len(lines) == 1
    assert line in lines[0]


def test_printed_settings_are_the_ones_that_would_run_and_can_be_read_again(capsys, file):
    argv = [*NEEDED, "--transfer.batch-rows", "2", "--limits.schemes", "file,s3"]
    with pytest.raises(SystemExit) as caught:
        cli.load(TransferSettings, [*argv, "--print-settings"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["transfer"]["batch_rows"] == 2
    assert cli.load(TransferSettings, file(printed)) == cli.load(TransferSettings, argv)


@pytest.mark.parametrize("cls", [PlanSettings, TransferSettings])
def test_help_explains_every_field(capsys, cls):
    with pytest.raises(SystemExit) as caught:
        cli.load(cls, ["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, description in fields(cls):
        assert description, f"{name} has no description"
        assert f"--{name.replace('_', '-')}" in shown or "YAML only" in description
    assert "--print-settings" in shown


@pytest.mark.parametrize("cls", [PlanSettings, TransferSettings])
def test_no_setting_could_hold_a_credential(cls):
    for name, _ in fields(cls):
        assert not any(word in name for word in ("secret", "password", "token", "access_key"))


def fields(cls, prefix=""):
    """(dotted name, description) of every leaf setting."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description


def test_an_error_code_says_whether_another_try_may_help():
    assert ErrorCode.STORAGE_UNAVAILABLE.transient
    assert not ErrorCode.TRUNCATED.transient


def test_a_row_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(RowError(ErrorCode.TRUNCATED, "cut")))
    assert (error.code, error.message) == (ErrorCode.TRUNCATED, "cut")
