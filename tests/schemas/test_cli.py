"""Settings from a file, the environment and the command line."""

import io

import pytest
import yaml

from schemas import PlanSettings, TransferSettings, cli

NEEDED = ["--manifest", "m", "--output", "o"]
PLAN = ["--references", "r", "--prompts", "p", "--output", "o"]


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "settings.yaml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        return ["--settings", str(path)]

    return write


def refused(capsys, argv, cls=TransferSettings):
    """The lines that a wrong command line prints; its exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        cli.load(cls, argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(file, monkeypatch):
    settings = file({"limits": {"row_seconds": 1, "max_frames": 11, "max_pixels": 1}, "transfer": {"batch_rows": 7}})
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


def test_lists_are_comma_separated_everywhere(file, monkeypatch):
    monkeypatch.setenv("VMT_LIMITS__SCHEMES", "file")
    argv = [*PLAN, "--methods", "fastvmt, none", *file({"seeds": "0,1,2"})]
    loaded = cli.load(PlanSettings, argv)
    assert (loaded.methods, loaded.seeds, loaded.limits.schemes) == (("fastvmt", "none"), (0, 1, 2), ("file",))


def test_flags_that_others_build_on():
    loaded = cli.load(PlanSettings, [*PLAN, "--model", "m", "--methods", "none", "--seeds", "7", "--skip-bad"])
    assert (loaded.references, loaded.prompts, loaded.output, loaded.model) == ("r", "p", "o", "m")
    assert (loaded.methods, loaded.seeds, loaded.skip_bad) == (("none",), (7,), True)
    loaded = cli.load(TransferSettings, [*NEEDED, "--model", "x", "--limit", "3", "--retry-failed"])
    assert (loaded.manifest, loaded.output, loaded.model) == ("m", "o", "x")
    assert (loaded.limit, loaded.retry_failed) == (3, True)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([*NEEDED, "--limits.row-secs", "5"], "--limits.row-secs: no such option; did you mean --limits.row-seconds?"),
        ([*NEEDED, "--limits.row_secs=5"], "--limits.row-secs: no such option; did you mean --limits.row-seconds?"),
        ([*NEEDED, "--retry"], "--retry: no such option; did you mean --retry-failed?"),  # no abbreviations
        ([*NEEDED, "--setings", "f"], "--setings: no such option; did you mean --settings?"),
        ([*NEEDED, "stray"], "unrecognized arguments: stray"),
        ([*NEEDED, "--device", "tpu"], "device: Input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
        ([*NEEDED, "--limit"], "--limit: expected one argument"),
        ([*NEEDED, "--limits.row-seconds", "soon"], "limits.row_seconds: Input should be a valid number"),
        ([*NEEDED, "--transfer.actors", "0"], "transfer.actors: Input should be greater than 0"),
        ([*NEEDED, "--transfer.actors", "3", "--transfer.max-actors", "2"], "max_actors=2 is less than actors=3"),
        (["--output", "o"], "manifest: required"),
        ([*NEEDED, "--settings", "nowhere.yaml"], "nowhere.yaml: No such file"),
        ([*NEEDED, "--settings"], "--settings: expected a file"),
        ([*NEEDED, "--settings", "a.yaml", "--settings=b.yaml"], "--settings: only one file"),
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
        ({"limits": 5}, "limits: Input should be a valid dictionary"),
        ({5: 5}, "5: no such setting"),
        ({"limits": {5: 5}}, "limits.5: Keys should be strings"),
        (b"a: [1", "not YAML"),
        (b"\xff\xfea: 1", "not YAML"),
        (b"a\x00: 1", "not YAML"),
        (b"- a\n- b", "expected a mapping of settings, found a list"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_field(capsys, file, content, line):
    lines = refused(capsys, [*NEEDED, *file(content)])
    assert len(lines) == 1
    assert line in lines[0]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("VMT_LIMITS__ROW_SECOND", "5", "limits.row_second: no such setting; did you mean row_seconds?"),
        ("VMT_LIMITS__ROW_SECONDS", "soon", "limits.row_seconds: Input should be a valid number"),
        ("VMT_LIMIT", "x", "limit: Input should be a valid integer"),
        ("VMT_LIMITS", "nope", '"limits"'),
    ],
)
def test_a_wrong_environment_is_one_line_that_names_the_field(capsys, monkeypatch, name, value, line):
    monkeypatch.setenv(name, value)
    lines = refused(capsys, NEEDED)
    assert len(lines) == 1
    assert line in lines[0]


def test_a_refused_password_is_not_shown(capsys):
    shown = refused(capsys, [*NEEDED, "--storage.endpoint-url", "http://user:hush@s3.example.org"])
    (line,) = shown
    assert line.startswith("error: storage.endpoint_url: holds a user or a password")
    assert "hush" not in line


def test_each_fault_has_its_line(capsys):
    assert refused(capsys, ["--limit", "x", "--model", "m"]) == [
        "error: manifest: required (--manifest …, or in the settings file)",
        "error: output: required (--output …, or in the settings file)",
        "error: limit: Input should be a valid integer, unable to parse string as an integer (got 'x')",
    ]


def test_an_empty_file_sets_nothing(file):
    assert cli.load(TransferSettings, [*NEEDED, *file(b"")]) == cli.load(TransferSettings, NEEDED)


@pytest.mark.parametrize(
    ("cls", "argv"),
    [
        (TransferSettings, [*NEEDED, "--transfer.batch-rows", "2", "--limits.schemes", "file,s3", "--retry-failed"]),
        (PlanSettings, [*PLAN, "--methods", "fastvmt,none", "--seeds", "1,2", "--negative-prompt", "a: [é] 🎈"]),
    ],
)
def test_printed_settings_are_the_ones_that_would_run_and_can_be_read_again(capsys, file, monkeypatch, cls, argv):
    monkeypatch.setenv("VMT_LIMITS__MAX_FRAMES", "12")
    argv = [*argv, *file({"limits": {"max_pixels": 99}})]
    with pytest.raises(SystemExit) as caught:
        cli.load(cls, [*argv, "--print-settings"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    expected = cli.load(cls, argv)
    assert yaml.safe_load(printed)["limits"].items() >= {"max_frames": 12, "max_pixels": 99}.items()
    assert yaml.safe_load(printed) == expected.model_dump(mode="json")  # the defaults as well
    monkeypatch.delenv("VMT_LIMITS__MAX_FRAMES")
    assert cli.load(cls, file(printed.encode())) == expected


def test_loaded_settings_are_of_the_class_itself():
    assert type(cli.load(TransferSettings, NEEDED)) is TransferSettings


def test_an_option_that_stands_there_twice_is_said_unless_it_is_a_list(capsys):
    assert cli.load(PlanSettings, [*PLAN, "--references", "other"]).references == "other"
    assert capsys.readouterr().err == "note: --references stands there 2 times; the last one counts\n"
    assert cli.load(PlanSettings, [*PLAN, "--methods", "none", "--methods", "fastvmt"]).methods == ("none", "fastvmt")
    assert capsys.readouterr().err == ""


def test_a_variable_that_no_job_reads_is_said(capsys, monkeypatch):
    monkeypatch.setenv("VMT_METHODZ", "none")
    monkeypatch.setenv("VMT_LIMIT", "3")  # of another job
    cli.load(PlanSettings, PLAN)
    assert capsys.readouterr().err == "note: VMT_METHODZ is no setting of any job; did you mean VMT_METHODS?\n"


@pytest.mark.parametrize("name", ["references", "output", "model"])
def test_an_empty_place_is_refused(capsys, name):
    argv = [word if word != "o" or name != "output" else "" for word in PLAN]
    argv = (
        argv
        if name == "output"
        else [*argv, f"--{name}", ""]
        if name == "model"
        else ["--references", "", "--output", "o"]
    )
    assert refused(capsys, argv, PlanSettings) == [f"error: {name}: String should have at least 1 character (got '')"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "-1"], "seeds.0: Input should be greater than or equal to 0"),
        (["--seeds", "3-1"], "seeds: 3-1: a range goes up"),
        (["--steps", "1001"], "steps: Input should be less than or equal to 1000"),
        (["--height", "100"], "height: Input should be a multiple of 16"),
        (["--fps", "1e9"], "fps: Input should be less than or equal to 240"),
    ],
)
def test_what_no_row_could_have_is_refused_before_clips_are_opened(capsys, words, message):
    assert message in refused(capsys, [*PLAN, *words], PlanSettings)[0]


def test_a_range_of_seeds():
    assert cli.load(PlanSettings, [*PLAN, "--seeds", "0-3,9"]).seeds == (0, 1, 2, 3, 9)


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", printed)
    cli.load(PlanSettings, PLAN)
    print("ünï/\udcff")
    printed.flush()
    assert printed.buffer.getvalue() == rb"\xfcn\xef/\udcff" + b"\n"
