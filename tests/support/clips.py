"""Good and bad videos."""

import struct
from fractions import Fraction

import av
import numpy as np
import torch

from vmt_core import video
from vmt_core.world import render, sample


def clip(path, *, frames=17, size=(64, 64), fps=12, motion="line", seed=0):
    """A playable clip; returns its path."""
    height, width = size
    video.write(path, render(sample(seed, motion=motion, frames=frames, height=height, width=width)), fps)
    return path


def counting(path, *, frames=20, size=(32, 32), fps=10.0):
    """A clip whose frame n is a flat gray of 10 n + 5."""
    levels = torch.arange(frames) * 10 + 5
    video.write(path, levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *size).contiguous(), fps, crf=0)
    return path


def numbers(frames):
    """Which frames of a counting clip these are."""
    return ((frames.float().mean((1, 2, 3)) - 5) / 10).round().int().tolist()


def _empty(path):
    path.write_bytes(b"")


def _text(path):
    path.write_text("this is a letter, not a video\n" * 50)


def _cut_at_the_front(path):
    """The index comes first: it promises frames that are not there."""
    clip(path, frames=33)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_before_the_index(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width = stream.height = 64
        for _ in range(20):
            image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _audio(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _bare(path):
    """H.264 without a container: it cannot be sought in."""
    encoded(path.with_suffix(".ts"), "libx264", "yuv420p")
    with av.open(str(path.with_suffix(".ts"))) as source, av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)


def _unknown_codec(path):
    clip(path)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz9"))


def _one_frame(path):
    clip(path, frames=1)


#: error code -> writer of a file that fails with it, whatever the limits
BAD = {
    "reference_empty": _empty,
    "not_a_video": _text,
    "truncated": _cut_at_the_front,
    "no_video_stream": _audio,
    "codec_unsupported": _unknown_codec,
    "too_few_frames": _one_frame,
}

#: further ways to be bad, as (error code, writer)
MORE_BAD = {
    "cut before the index": ("truncated", _cut_before_the_index),
    "noise": ("not_a_video", lambda path: path.write_bytes(np.random.default_rng(0).bytes(100_000))),
    "no container": ("not_a_video", _bare),
    "one byte": ("not_a_video", lambda path: path.write_bytes(b"x")),
}


def encoded(
    path,
    codec,
    pixels,
    *,
    times=range(20),
    last=1,
    size=(32, 32),
    options=None,
    muxer=None,
    tags=None,
    aspect=None,
    image=None,
):
    """A counting clip in any codec and container, whose frame n is shown from times[n], in tenths of a second.

    Args:
        last: how long the last frame is shown.
        muxer: options of the container.
        aspect: width of a pixel over its height.
        image: what every frame shows, (height, width, 3), instead of its number.
    """
    if image is not None:
        size = image.shape[:2]
    with av.open(str(path), "w", options=muxer or {}) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = size
        stream.pix_fmt, stream.options = pixels, options or {}
        stream.codec_context.time_base = Fraction(1, 10)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        packets = []
        for number, time in enumerate(times):
            shown = np.full((*size, 3), 10 * (number % 25) + 5, np.uint8) if image is None else image
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets[-1].duration = last
        container.mux(packets)
    return path


def variable_rate(path, times, *, last=1):
    """A clip whose frames are shown for different times."""
    return encoded(path, "libx264", "yuv420p", times=times, last=last, options={"crf": "0", "bf": "0"})


def turned(path, degrees):
    """Marks an mp4 as to be shown turned clockwise, as phones do."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    content = bytearray(path.read_bytes())
    start = content.index(_matrix(1, 0, 0, 1), content.index(b"tkhd"))
    content[start : start + 36] = _matrix(*matrix)
    path.write_bytes(content)
    return path


def _matrix(a, b, c, d):
    return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)


def trimmed(path, seconds):
    """Shortens an mp4 by its edit list alone, as phones do: all frames stay in the file."""
    content = bytearray(path.read_bytes())
    start = content.index(b"elst") + 12
    content[start : start + 4] = struct.pack(">I", round(1000 * seconds))
    path.write_bytes(content)
    return path


def growing(path, size):
    """A .ts of 20 frames of 32x32 that goes on with 20 of another size."""
    parts = [encoded(path.with_name(f"{side}.ts"), "libx264", "yuv420p", size=(side, side)) for side in (32, size)]
    with av.open(str(path), "w") as container:
        for number, part in enumerate(parts):
            with av.open(str(part)) as source:
                stream = stream if number else container.add_stream_from_template(source.streams.video[0])  # noqa: F821
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        for name in ("pts", "dts"):
                            setattr(packet, name, getattr(packet, name) + number * 2 * 90_000)
                        container.mux(packet)
    return path
