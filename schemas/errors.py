"""Why a row failed: one flat vocabulary for every stage, stored in `error_code` of the result row.

A *permanent* error is a fact about the row: the same input fails again. A *transient* one is a fact about the moment
(storage, memory, a dead process): it was retried with backoff before it became a failed row, and `--retry-failed` may help.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import ValidationError


class ErrorCode(StrEnum):
    """What went wrong with a row. The comment says what the user can do about it."""

    # the reference, before its bytes are looked at
    SCHEME_FORBIDDEN = "scheme_forbidden"  # allow it in limits.schemes
    REFERENCE_MISSING = "reference_missing"  # fix the uri
    REFERENCE_FORBIDDEN = "reference_forbidden"  # credentials or bucket policy (403)
    REFERENCE_EMPTY = "reference_empty"  # zero bytes
    REFERENCE_TOO_LARGE = "reference_too_large"  # limits.max_reference_mib
    REFERENCE_CHANGED = "reference_changed"  # its bytes are not those that were planned: plan again
    # the reference, as a video
    NOT_A_VIDEO = "not_a_video"  # no container that FFmpeg knows
    NO_VIDEO_STREAM = "no_video_stream"  # audio only
    CODEC_UNSUPPORTED = "codec_unsupported"
    TRUNCATED = "truncated"  # the file ends before its frames do
    TOO_FEW_FRAMES = "too_few_frames"
    TOO_MANY_FRAMES = "too_many_frames"  # limits.max_frames or limits.max_duration_s
    TOO_MANY_PIXELS = "too_many_pixels"  # limits.max_pixels
    # the text
    PROMPT_EMPTY = "prompt_empty"
    PROMPT_TOO_LONG = "prompt_too_long"  # limits.max_prompt_chars
    # the adapter of a tuned method
    CAPTION_EMPTY = "caption_empty"  # tuning needs to know what the reference shows
    ADAPTER_MISSING = "adapter_missing"  # tune first, or its tuning failed
    ADAPTER_UNFIT = "adapter_unfit"  # a damaged file, or of another model or method
    # the computation
    NON_FINITE = "non_finite"  # NaN or inf in the latents
    ENCODE_FAILED = "encode_failed"  # the written mp4 did not decode again
    INTERNAL = "internal"  # a bug: the message names the exception
    # the machine
    STORAGE_UNAVAILABLE = "storage_unavailable"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"  # the row took its worker process down twice
    TIMED_OUT = "timed_out"  # limits.row_seconds

    @property
    def transient(self) -> bool:
        """True if the same row may well succeed on another try."""
        return self in _TRANSIENT


_TRANSIENT = frozenset({ErrorCode.STORAGE_UNAVAILABLE, ErrorCode.OUT_OF_MEMORY, ErrorCode.CRASHED, ErrorCode.TIMED_OUT})


class RowError(Exception):
    """An error that belongs to one row and ends up in its result row.

    Args:
        code: the vocabulary entry.
        message: names the value, the limit and the way out.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def renamed(self, path: Path, uri: str) -> RowError:
        """The same, said of what the user named instead of the local copy of it."""
        return RowError(self.code, self.message.replace(str(path), uri))

    def __reduce__(self) -> tuple[type[RowError], tuple[ErrorCode, str]]:  # travels between processes
        return (type(self), (self.code, self.message))


class UsageError(Exception):
    """What was asked cannot be run: the job prints one line and exits with 2."""


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with a row's values: `height: Input should be … (got 100)`."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']} (got {fault['input']!r:.100})"
