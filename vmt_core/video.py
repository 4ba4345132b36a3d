"""Video files: probe, read a reference as the model wants it, write a result that plays everywhere (PyAV).

A frame is addressed by its time: frame n of a clip is the one shown at n / rate after the first, to the nearest half frame,
which is exact for constant frame rates and the sensible reading of variable ones. Containers are limited to real video formats,
so that a playlist or a concat script named .mp4 cannot make FFmpeg open other files.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import av.error
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from av.video.stream import VideoStream

from schemas.errors import ErrorCode, RowError
from schemas.sections import LimitSettings
from vmt_core.shapes import Frames

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,mxf"
SUFFIXES = frozenset(
    {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv", ".gif"}
)

#: The matrix that FFmpeg makes yuv with, by its number. It is said in what is written, as players take large videos for BT.709 otherwise.
_BT601 = 6
#: How much of its time a frame gives to the one after: nearly half, so that rounded timestamps never decide between two.
_EARLY = 0.45
#: libx264 writes other frames with other numbers of threads; by itself it takes as many as the machine has.
_ENCODER_THREADS = 4


@dataclass(frozen=True)
class VideoInfo:
    """What a file's headers say. `frames` may be an estimate from the duration."""

    width: int
    height: int
    fps: float
    frames: int
    codec: str


def probe(path: str | Path, limits: LimitSettings) -> VideoInfo:
    """Reads the headers and checks them against the limits; decodes one frame and counts the others without decoding them.

    Raises:
        RowError: what is wrong with the file.
    """
    with _open(path) as container:
        stream, info = _inspect(path, container, limits)
        try:
            next(container.decode(stream))
        except (StopIteration, av.error.FFmpegError) as error:
            raise RowError(ErrorCode.TRUNCATED, f"{path}: no frame can be decoded ({error or 'no data'})") from error
        try:
            found = _packets(container, stream) if stream.frames or not info.frames else info.frames
        except av.error.FFmpegError as error:
            raise RowError(ErrorCode.TRUNCATED, f"{path}: cannot be read from its beginning ({error})") from error
    if not info.frames:  # a live recording does not know its length
        info = replace(info, frames=found)
        _within(path, found, found / info.fps, limits)
    if found < 0.99 * info.frames - 1:
        raise RowError(
            ErrorCode.TRUNCATED, f"{path}: its header promises {info.frames} frames, but the file holds {found}"
        )
    return info


def clip_frames(info: VideoInfo, start: int, end: int | None, fps: float, most: int) -> int:
    """How many frames (4k+1, at most `most`) the range [start, end) of a file gives at `fps`; less than 5 is too few."""
    length = min(end if end is not None else info.frames, info.frames) - start
    available = int((length - 1) / info.fps * fps + 1e-6) + 1 if length > 0 else 0
    available = min(available, most)
    return available - (available - 1) % 4 if available else 0


def read(
    path: str | Path,
    *,
    height: int,
    width: int,
    frames: int,
    fps: float,
    start: int = 0,
    end: int | None = None,
    limits: LimitSettings | None = None,
) -> Frames:
    """A reference clip: sampled at `fps`, scaled to cover `height` x `width`, cropped at the centre.

    Args:
        frames: how many to return, 4k+1.
        start, end: range in frames of the file.

    Returns:
        (frames, 3, height, width) uint8.

    Raises:
        RowError: the file is bad, over the limits, or too short.
        ValueError: a size, a rate or a range that no clip can have.
    """
    if min(height, width, frames) < 1 or not fps > 0 or start < 0:
        raise ValueError(f"{path}: no clip has {height=}, {width=}, {frames=}, {fps=}, {start=}")
    limits = limits or LimitSettings()
    with _open(path) as container:
        stream, info = _inspect(path, container, limits)
        out = np.empty((frames, height, width, 3), np.uint8)
        wanted = start / info.fps + np.arange(frames) / fps
        stop = end / info.fps if end is not None else float("inf")
        taken, last, step = 0, -1.0, 1 / info.fps
        stretch = float(stream.sample_aspect_ratio or 1)
        current: av.VideoFrame | None = None
        try:
            for time, frame in _timed(container, stream, wanted[0]):
                if current is not None:  # it is shown until this one
                    until = min(time, stop) - _EARLY * min(step, time - last)
                    while taken < frames and wanted[taken] < until:
                        out[taken] = _cover(current, height, width, stretch)
                        taken += 1
                if taken == frames or time >= stop - 1e-6:
                    break
                _small_enough(path, frame.width, frame.height, limits)  # a stream may change its size
                current, last = frame, time
        except av.error.FFmpegError as error:
            if taken == 0 and current is None:
                raise RowError(ErrorCode.TRUNCATED, f"{path}: no frame can be decoded ({error})") from error
        if current is not None:
            shown = float((current.duration or 0) * (stream.time_base or 0))  # the last frame may stand for long
            until = min(stop, last + max(step, shown)) - _EARLY * step
            while taken < frames and wanted[taken] < until:
                out[taken] = _cover(current, height, width, stretch)
                taken += 1
    if taken < frames:
        promised = clip_frames(info, start, end, fps, frames)
        if promised >= frames:
            raise RowError(
                ErrorCode.TRUNCATED,
                f"{path}: its header promises {info.frames} frames, but only {taken} of {frames} could be read",
            )
        raise RowError(ErrorCode.TOO_FEW_FRAMES, f"{path}: gives {taken} frames at {fps:g} fps, {frames} are needed")
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def write(
    path: str | Path,
    frames: Frames,
    fps: float,
    *,
    tags: Mapping[str, str] | None = None,
    crf: int = 18,
    preset: str = "medium",
) -> None:
    """Writes H.264 (yuv420p, faststart) with metadata tags.

    Args:
        frames: (T, 3, H, W) uint8, H and W even.
        fps: kept exactly to 1/1001.

    Raises:
        ValueError: frames or a rate that no such video can have.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not all(side > 0 and side % 2 == 0 for side in frames.shape[-2:]):
        raise ValueError(f"{path}: frames are {tuple(frames.shape)}, not (T, 3, H, W) with even H and W")
    if not 0 < fps <= 1001:
        raise ValueError(f"{path}: fps={fps} is not above 0, up to 1001")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = _ENCODER_THREADS
        context.colorspace, context.color_range = _BT601, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.IEC61966_2_1
        # mbtree makes libx264 write other bytes for the same frames, now and then
        stream.options = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0"}
        for image in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def tags(path: str | Path) -> dict[str, str]:
    """The metadata of a file, as `write` put them in."""
    with _open(path) as container:
        return {str(name): str(value) for name, value in container.metadata.items()}


def verify(path: str | Path, *, frames: int, height: int, width: int) -> None:
    """Decodes a written file completely.

    Raises:
        RowError: encode_failed, if it does not hold exactly these frames.
    """
    try:
        with av.open(str(path), options={"format_whitelist": _FORMATS}, metadata_errors="replace") as container:
            shapes = [(frame.height, frame.width) for frame in container.decode(video=0)]
    except av.error.FFmpegError as error:
        raise RowError(ErrorCode.ENCODE_FAILED, f"{path}: the written video does not decode: {error}") from error
    if shapes != [(height, width)] * frames:
        found = f"{len(shapes)} frames of {shapes[0] if shapes else None}"
        raise RowError(
            ErrorCode.ENCODE_FAILED, f"{path}: wrote {frames} frames of {(height, width)}, but it holds {found}"
        )


def _open(path: str | Path) -> InputContainer:
    if not Path(path).is_file():
        raise RowError(ErrorCode.REFERENCE_MISSING, f"{path}: no such file")
    if Path(path).stat().st_size == 0:
        raise RowError(ErrorCode.REFERENCE_EMPTY, f"{path}: the file has no bytes")
    try:
        return av.open(
            str(path),
            options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",  # a title in Latin-1 makes no clip bad
        )
    except av.error.FFmpegError as error:
        with open(path, "rb") as file:
            begins_as_mp4 = file.read(12)[4:8] == b"ftyp"
        if begins_as_mp4:
            raise RowError(
                ErrorCode.TRUNCATED, f"{path}: begins as an mp4 but has no index (moov), so it was cut off"
            ) from error
        reason = (
            "not a video file" if error.errno in (errno.EINVAL, None) or isinstance(error, ValueError) else str(error)
        )
        raise RowError(ErrorCode.NOT_A_VIDEO, f"{path}: {reason}") from error


def _inspect(path: str | Path, container: InputContainer, limits: LimitSettings) -> tuple[VideoStream, VideoInfo]:
    """The video stream and its header, checked against the limits before anything is decoded."""
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise RowError(ErrorCode.NO_VIDEO_STREAM, f"{path}: has no video stream (streams: {kinds})")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise RowError(ErrorCode.CODEC_UNSUPPORTED, f"{path}: no decoder for its video stream")
    width, height = stream.codec_context.width, stream.codec_context.height
    rate = stream.average_rate or stream.guessed_rate
    if not rate or width <= 0 or height <= 0:
        raise RowError(
            ErrorCode.TRUNCATED, f"{path}: its header gives no frame size or rate ({width}x{height}, {rate} fps)"
        )
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = container.duration / av.time_base if container.duration else 0.0
    fps = float(rate)
    shown = round(seconds * fps)  # fewer than the file has, where an edit list trims it
    count = min(stream.frames, shown) if stream.frames and shown else stream.frames or shown
    info = VideoInfo(width, height, fps, count, stream.codec_context.name)
    _small_enough(path, width, height, limits)
    _within(path, count, seconds, limits)
    stream.thread_type = "AUTO"
    # much larger frames further on are not even decoded (twice, because codecs round sizes up)
    stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels)}
    return stream, info


def _small_enough(path: str | Path, width: int, height: int, limits: LimitSettings) -> None:
    if width * height > limits.max_pixels:
        raise RowError(
            ErrorCode.TOO_MANY_PIXELS,
            f"{path}: {width}x{height} is over limits.max_pixels={limits.max_pixels}; scale it down",
        )


def _within(path: str | Path, frames: int, seconds: float, limits: LimitSettings) -> None:
    if frames > limits.max_frames or seconds > limits.max_duration_s:
        raise RowError(
            ErrorCode.TOO_MANY_FRAMES,
            f"{path}: {frames} frames, {seconds:.0f} s are over limits.max_frames={limits.max_frames} or "
            f"limits.max_duration_s={limits.max_duration_s:g}; cut it",
        )


def _packets(container: InputContainer, stream: VideoStream) -> int:
    """How many frames are in the file, from first to last."""
    found = 0
    container.seek(0, stream=stream)
    with contextlib.suppress(av.error.FFmpegError):  # where the file ends
        for packet in container.demux(stream):
            found += packet.size > 0
    return found


def _timed(container: InputContainer, stream: VideoStream, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames with their times from the first, in seconds, beginning at or before `start`."""
    base = float(stream.time_base or Fraction(1, 1))
    frames: Iterator[av.VideoFrame] = container.decode(stream)
    first = next(frames, None)
    if first is None:
        return
    # the header's start may be another: AVI files with B-frames say 0 and begin later
    origin = (first.pts if first.pts is not None else stream.start_time or 0) * base
    before = 0.5
    while start > 2:  # far in: jump to the keyframe before; where a format jumps to the one after, from further ahead
        container.seek(int((origin + max(0.0, start - before)) / base), stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames, None)
        if before >= start or (first is not None and (first.pts or 0) * base - origin <= start + 1e-6):
            break
        before *= 4
    fallback = 0.0
    for frame in chain([first] if first is not None else [], frames):
        time = frame.pts * base - origin if frame.pts is not None else fallback
        fallback = time + 1 / float(stream.average_rate or 25)
        yield time, frame


def _cover(
    frame: av.VideoFrame, height: int, width: int, stretch: float
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The frame upright, scaled to cover the size and cropped at the centre: (height, width, 3) uint8.

    Args:
        stretch: width of a pixel over its height; 1 but for what comes from DVDs, tapes and broadcasts.
    """
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    shown = (frame.height, frame.width * stretch)[:: -1 if turns % 2 else 1]
    scale = max(height / shown[0], width / shown[1])
    tall, wide = max(height, round(shown[0] * scale)), max(width, round(shown[1] * scale))
    size = (wide, tall) if turns % 2 == 0 else (tall, wide)
    scaled = frame.reformat(size[0], size[1], "rgb24", interpolation="AREA" if scale < 1 else "BICUBIC")
    image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.rot90(
        scaled.to_ndarray().astype(np.uint8, copy=False), turns
    )
    top, left = (tall - height) // 2, (wide - width) // 2
    return image[top : top + height, left : left + width]
