"""What may be set, and what may not."""

import pickle

import pytest
from pydantic import BaseModel, ValidationError

import schemas
from schemas import BenchSettings, LimitSettings, PlanSettings, StageSettings, StorageSettings, TransferSettings, cli
from schemas.sections import Section
from schemas.settings import JobSettings

JOBS = [PlanSettings, TransferSettings]


def subclasses(cls):
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def leaves(cls, prefix=""):
    """(dotted name, field) of every setting."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def plan(**values):
    return PlanSettings(references="r", prompts="p", output="o", **values)


@pytest.mark.parametrize("cls", sorted(subclasses(Section) | subclasses(JobSettings), key=lambda cls: cls.__name__))
def test_every_setting_says_what_it_is(cls):
    assert cls.__doc__
    assert [name for name, field in leaves(cls) if not field.description] == []


@pytest.mark.parametrize("cls", JOBS)
def test_help_explains_every_setting(capsys, cls):
    with pytest.raises(SystemExit) as caught:
        cli.load(cls, ["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    for name, field in leaves(cls):
        assert f"--{name.replace('_', '-')}" in shown
        assert "".join(field.description.split()) in shown
    assert "--print-settings" in shown
    assert "--settingsFILE.yaml" in shown


@pytest.mark.parametrize("cls", JOBS)
def test_no_setting_could_hold_a_credential(cls):
    words = ("key", "secret", "token", "password", "credential")
    assert [name for name, _ in leaves(cls) if any(word in name for word in words)] == []


@pytest.mark.parametrize("cls", JOBS)
def test_every_number_of_seconds_bytes_or_pixels_has_its_unit(cls):
    for name, field in leaves(cls):
        if any(word in name for word in ("duration", "wait", "stall", "timeout", "progress", "seconds")):
            assert name.endswith(("_s", "_seconds")), name
        if any(word in name for word in ("memory", "reference_m")):
            assert name.endswith(("_mib", "_gib")), name
        if name.endswith(("height", "width")):
            assert "pixels" in field.description


@pytest.mark.parametrize("settings", [plan(), TransferSettings(manifest="m", output="o")])
def test_settings_cannot_be_changed_and_travel_between_processes(settings):
    with pytest.raises(ValidationError, match="frozen"):
        settings.limits.row_seconds = 1
    with pytest.raises(ValidationError, match="frozen"):
        settings.output = "elsewhere"
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(settings.storage) == hash(settings.storage.model_copy())  # connections are kept by it


@pytest.mark.parametrize("words", ["file,s3", " file , s3 ,", ["file", "s3"]])
def test_a_list_is_a_list_or_words_with_commas(words):
    assert LimitSettings(schemes=words).schemes == ("file", "s3")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"actors": 3, "max_actors": 2}, "max_actors=2 is less than actors=3"),
        ({"actors": 0}, "greater than 0"),
        ({"gpus": -1}, "greater than or equal to 0"),
        ({"actor": 1}, "Extra inputs"),
    ],
)
def test_pools_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        StageSettings(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"seeds": "1,x"},
        {"dtype": "float16"},
        {"height": 0},
        {"fps": float("inf")},
        {"method_settings": {"a": 1}},
        {"shift": float("inf")},
        {"shift": 1e39},
        {"guidance_scale": float("inf")},
    ],
)
def test_wrong_values_are_refused(values):
    with pytest.raises(ValidationError, match=next(iter(values))):
        plan(**values)


def test_a_preset_that_x264_does_not_have_is_refused_before_anything_is_denoised():
    with pytest.raises(ValidationError, match="'ultrafast', 'superfast'"):
        TransferSettings(manifest="m", output="o", video={"preset": "bogus"})


@pytest.mark.parametrize(("frames", "instead"), [(18, 17), (3, 5), (4, 5)])
def test_frames_that_do_not_fill_latents_are_refused_with_the_next_number_that_does(frames, instead):
    with pytest.raises(ValidationError, match=f"{frames} is not 4k.1 and at least 5; use {instead}"):
        PlanSettings(references="r", output="o", frames=frames)


def test_an_endpoint_holds_no_credentials():
    """Settings are written beside the results."""
    assert StorageSettings(endpoint_url="https://s3.example.org:9000").endpoint_url
    with pytest.raises(ValidationError, match="credentials come from the AWS environment"):
        StorageSettings(endpoint_url="https://user:secret@s3.example.org")


def test_one_import_gives_all_that_others_need():
    assert all(hasattr(schemas, name) for name in schemas.__all__)


def test_a_part_of_a_job_takes_nothing_from_the_environment(monkeypatch):
    monkeypatch.setenv("VMT_LIMIT", "2")
    monkeypatch.setenv("VMT_SAMPLES", "abc")
    whole = BenchSettings(output="o", transfer={"batch_rows": 3}, retry_failed=True)
    part = TransferSettings.like(whole, manifest="m")
    assert (part.limit, part.samples) == (None, ())
    assert (part.output, part.transfer.batch_rows, part.retry_failed) == ("o", 3, True)
    assert TransferSettings(manifest="m", output="o").limit == 2


def test_one_number_in_a_file_is_a_list_of_one():
    assert plan(seeds=5).seeds == (5,)
