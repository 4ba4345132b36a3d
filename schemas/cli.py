"""A job's settings from its command line: `--settings FILE.yaml` < environment `VMT_…` < `--flags`.

Wrong input is one line per fault, with the field's name, the value and what is allowed, and exit code 2.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import CliSettingsSource, SettingsError

from schemas.settings import JobSettings

S = TypeVar("S", bound=JobSettings)


def load(cls: type[S], argv: list[str] | None = None) -> S:
    """Settings of a job from its arguments; `--print-settings` prints them as YAML and exits 0.

    Raises:
        SystemExit: 2 with one line per fault, 0 after `--help` or `--print-settings`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    show = "--print-settings" in argv
    argv = [word for word in argv if word != "--print-settings"]
    argv, path = _take_option(argv, "--settings")
    if _take_option(argv, "--settings")[1] is not None:
        fail("--settings: only one file")
    argv = [_kebab(word) for word in argv]
    for stream in (sys.stdout, sys.stderr):  # names of files may be what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _say_repetition(cls, argv)
    _say_misspelt_variable(cls)
    job: Any = type(cls.__name__, (cls,), {"__doc__": _usage(cls), "__module__": cls.__module__})
    if path is not None:
        job.model_config = {**cls.model_config, "yaml_file": path}
        _check_yaml(path)
    try:
        loaded = job(_cli_settings_source=CliSettingsSource(job, cli_parse_args=argv))
        settings = cls(**loaded.model_dump())  # of the class itself, which other processes know
    except ValidationError as error:
        fail(*(_explain(cls, fault) for fault in error.errors()))
    except SettingsError as error:
        fail(*_explain_words(cls, str(error).removeprefix("error parsing CLI: ")))
    if show:
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return settings


def fail(*lines: str) -> NoReturn:
    """Prints each line as an error and exits with 2, wrong usage."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def _usage(cls: type[JobSettings]) -> str:
    return (
        f"{cls.__doc__} Other options: --settings FILE.yaml reads settings from a file; --print-settings shows "
        "what would run. Every option is also an environment variable, e.g. VMT_STORAGE__ATTEMPTS."
    )


def _kebab(word: str) -> str:
    """`--limits.row_seconds=5` as `--limits.row-seconds=5`: both spellings are welcome."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _say_repetition(cls: type[BaseModel], argv: list[str]) -> None:
    """Says which options of one value stand there several times: scripts override by it, people may mean a list."""
    given = Counter(word.partition("=")[0] for word in argv if word.startswith("--"))
    single = {option for option, field in _fields(cls) if get_origin(field.annotation) not in (tuple, list, dict)}
    for name, count in given.items():
        if count > 1 and name in single:
            print(f"note: {name} stands there {count} times; the last one counts", file=sys.stderr)


def _say_misspelt_variable(cls: type[BaseModel]) -> None:
    """Says which variables of the environment no job reads."""
    own, jobs, known = _variables(cls), [JobSettings], set[str]()
    while jobs:
        job = jobs.pop()
        jobs += job.__subclasses__()
        known |= _variables(job)
    for name in sorted(os.environ):
        top = name.partition("__")[0].upper()
        if top.startswith("VMT_") and top not in known:
            near = difflib.get_close_matches(top, own, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"note: {name} is no setting of any job{hint}", file=sys.stderr)


def _variables(cls: type[BaseModel]) -> set[str]:
    return {f"VMT_{name.upper()}" for name in cls.model_fields}


def _take_option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """Removes `name VALUE` or `name=VALUE` from the arguments."""
    for index, word in enumerate(argv):
        if word.startswith(name + "="):
            return argv[:index] + argv[index + 1 :], word.split("=", 1)[1]
        if word == name:
            if index + 1 == len(argv):
                fail(f"{name}: expected a file")
            return argv[:index] + argv[index + 2 :], argv[index + 1]
    return argv, None


def _check_yaml(path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        fail(f"--settings {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"--settings {path}: not YAML: {' '.join(str(error).split())}")
    if content is not None and not isinstance(content, dict):
        fail(f"--settings {path}: expected a mapping of settings, found a {type(content).__name__}")
    if odd := [key for key in content or {} if not isinstance(key, str)]:
        fail(f"--settings {path}: {odd[0]!r}: no such setting")


def _explain_words(cls: type[BaseModel], message: str) -> list[str]:
    """`--limits.row-secs: no such option; did you mean --limits.row-seconds?`; other messages as they are."""
    known, unknown = (
        [*(option for option, _ in _fields(cls)), "--settings", "--print-settings"],
        message.partition("unrecognized arguments: ")[2].split(),
    )
    lines = []
    for name in [word.partition("=")[0] for word in unknown if word.startswith("--")]:
        near = difflib.get_close_matches(name, known, n=1)
        lines.append(f"{name}: no such option" + (f"; did you mean {near[0]}?" if near else ""))
    return lines or [f"{message}; see {sys.argv[0]} --help"]


def _fields(cls: type[BaseModel], prefix: str = "--") -> Iterator[tuple[str, FieldInfo]]:
    """Each option with its field."""
    for name, field in cls.model_fields.items():
        option = prefix + name.replace("_", "-")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{option}.")
        else:
            yield option, field


def _explain(cls: type[BaseModel], fault: Any) -> str:
    """`limits.row_second: no such setting; did you mean row_seconds?`"""
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path) or "settings"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _fields_at(cls, path[:-1]), n=1)
        return f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    if fault["type"] == "missing":
        return f"{name}: required (--{name} …, or in the settings file)"
    value = fault.get("input")
    secret = isinstance(value, str) and "@" in value  # a password, it may be
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool) and not secret else ""
    return f"{name}: {fault['msg'].removeprefix('Value error, ')}{shown}"


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = cls.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        cls = field.annotation
    return list(cls.model_fields)
