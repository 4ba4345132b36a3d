"""Video files in and out."""

import functools
import hashlib
import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import LimitSettings, RowError
from support.clips import BAD, MORE_BAD, clip, counting, encoded, growing, numbers, trimmed, turned, variable_rate
from vmt_core import video
from vmt_core.world import render, sample

LIMITS = LimitSettings()


def failure(call, *args, **kwargs):
    with pytest.raises(RowError) as caught:
        call(*args, **kwargs)
    return caught.value.code.value, caught.value.message


def read(path, **changes):
    return video.read(path, **({"height": 32, "width": 32, "frames": 9, "fps": 10.0} | changes))


# ---- writing


@pytest.mark.parametrize("fps", [12.0, 24000 / 1001, 29.97, 60.0])
def test_what_is_written_is_what_is_read(tmp_path, fps):
    frames = render(sample(1, frames=17, height=96, width=160))
    video.write(tmp_path / "v.mp4", frames, fps)
    info = video.probe(tmp_path / "v.mp4", LIMITS)
    assert (info.width, info.height, info.frames, info.codec) == (160, 96, 17, "h264")
    assert info.fps == pytest.approx(fps, rel=1e-12)
    back = video.read(tmp_path / "v.mp4", height=96, width=160, frames=17, fps=info.fps)
    error = (back.float() - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 30  # dB; yuv420p halves the colours


def test_it_plays_before_it_is_loaded_and_says_what_it_is(tmp_path):
    path = tmp_path / "v.mp4"
    tags = {"comment": "AI-generated", "sample_id": "ab", "method": "fastvmt", "model": "wan-nano"}
    video.write(path, render(sample(1, frames=5, height=32, width=32)), 12, tags=tags)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(path)) as container:
        assert tags.items() <= dict(container.metadata).items()


def test_verify_accepts_what_was_written_and_nothing_else(tmp_path):
    path = clip(tmp_path / "v.mp4", frames=9, size=(32, 48))
    video.verify(path, frames=9, height=32, width=48)
    assert failure(video.verify, path, frames=13, height=32, width=48)[0] == "encode_failed"
    assert failure(video.verify, path, frames=9, height=48, width=48)[0] == "encode_failed"
    path.write_bytes(path.read_bytes()[:-200])
    assert failure(video.verify, path, frames=9, height=32, width=48)[0] == "encode_failed"


# ---- reading


def test_a_frame_range(tmp_path):
    path = counting(tmp_path / "v.mp4")
    assert numbers(read(path)) == list(range(9))
    assert numbers(read(path, start=5)) == list(range(5, 14))
    assert numbers(read(path, start=5, end=10, frames=5)) == list(range(5, 10))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (10.0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (5.0, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (20 / 3, [0, 1, 3, 4, 6, 7, 9, 10, 12]),  # as 24 -> 16: in steps, not as rounding errors fall
        (7.5, [0, 1, 3, 4, 5, 7, 8, 9, 11]),
        (20.0, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (30.0, [0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (40.0, [0, 0, 0, 1, 1, 1, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("rate", [10.0, 24000 / 1001])
def test_a_rate_picks_the_frame_that_is_shown_at_that_time(tmp_path, rate, fps, expected):
    path = counting(tmp_path / "v.mp4", fps=rate)
    assert numbers(read(path, fps=fps / 10 * rate)) == expected


@pytest.mark.parametrize("between", [8, 25, 100])
@pytest.mark.parametrize("name", ["v.mp4", "v.ts", "v.mkv"])
def test_a_range_far_into_a_long_clip(tmp_path, name, between):
    options = {"crf": "0", "g": str(between), "sc_threshold": "0"}
    path = encoded(tmp_path / name, "libx264", "yuv420p", times=range(60), options=options)
    for start in range(20, 50):  # wherever the keyframe before it lies
        assert numbers(read(path, start=start, frames=5)) == [n % 25 for n in range(start, start + 5)]


@pytest.mark.parametrize(
    ("times", "last", "expected"),
    [
        ([0, 1, 2, 6, 7, 8, 9, 10, 11, 12], 1, [0, 1, 2, 2, 2, 2, 3, 4, 5]),
        ([0, 1, 2, 3, 50], 1, [0, 1, 2, 3, 3, 3, 3, 3, 3]),  # the mean rate is 1, the motion has 10
        (range(10), 40, [*range(10), *[9] * 35]),  # the end of a screen recording
    ],
)
def test_variable_frame_rates_are_read_by_time(tmp_path, times, last, expected):
    path = variable_rate(tmp_path / "v.mp4", times, last=last)
    assert video.clip_frames(video.probe(path, LIMITS), 0, None, 10.0, len(expected)) == len(expected)
    assert numbers(read(path, frames=len(expected))) == expected


def test_a_range_may_end_while_a_frame_is_shown(tmp_path):
    path = variable_rate(tmp_path / "v.mp4", [0, 1, 2, 3, 50])  # about a frame a second
    assert numbers(read(path, end=2)) == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert failure(read, path, end=2, frames=25)[0] == "too_few_frames"


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("v.mp4", "libx264", "yuv444p"),
        ("v.mp4", "libx265", "yuv420p10le"),
        ("v.mp4", "libsvtav1", "yuv420p"),
        ("v.mov", "prores_ks", "yuv422p10le"),
        ("v.mkv", "ffv1", "yuva420p"),
        ("v.webm", "libvpx-vp9", "yuv420p"),
        ("v.avi", "mjpeg", "yuvj420p"),
        ("v.avi", "libx264", "yuv420p"),  # says that it starts at 0, and begins with frame 1
        ("v.ts", "libx264", "yuv420p"),  # its first frame is not at 0, and its header has no count
        ("v.flv", "flv", "yuv420p"),
        ("v.wmv", "wmv2", "yuv420p"),
        ("v.gif", "gif", "rgb8"),
    ],
)
def test_what_people_have_can_be_read(tmp_path, name, codec, pixels):
    path = encoded(tmp_path / name, codec, pixels)
    info = video.probe(path, LIMITS)
    assert (info.frames, info.fps, info.width, info.height) == (20, 10.0, 32, 32)
    assert numbers(read(path)) == list(range(9))
    assert numbers(read(path, start=12, frames=5)) == list(range(12, 17))


def test_a_trimmed_clip_ends_where_it_is_shown_to_end(tmp_path):
    path = trimmed(counting(tmp_path / "v.mp4"), 1.0)
    assert video.probe(path, LIMITS).frames == 10
    assert numbers(read(path)) == list(range(9))


@pytest.mark.parametrize(("degrees", "corner"), [(90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_a_turned_clip_is_read_upright(tmp_path, degrees, corner):
    height, width = (32, 64) if degrees == 180 else (64, 32)
    frames = torch.zeros(5, 3, 32, 64, dtype=torch.uint8)
    frames[:, :, :16, :16] = 255
    video.write(tmp_path / "v.mp4", frames, 10)
    found = read(turned(tmp_path / "v.mp4", degrees), height=height, width=width, frames=5)[0].float().mean(0)
    halves = found.unflatten(1, (2, -1)).unflatten(0, (2, -1)).mean((1, 3))
    assert divmod(int(halves.argmax()), 2) == corner


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "libx264"), ("v.avi", "mjpeg"), ("v.mkv", "libx264")])
def test_a_title_in_another_encoding_makes_no_clip_bad(tmp_path, name, codec):
    path = encoded(tmp_path / name, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p", tags={"title": "cafe-cafe"})
    path.write_bytes(path.read_bytes().replace(b"cafe-cafe", b"caf\xe9-cafe"))
    assert video.probe(path, LIMITS).frames == 20
    assert numbers(read(path)) == list(range(9))
    video.tags(path)


@pytest.mark.parametrize(("name", "codec"), [("v.mkv", "libx264"), ("v.webm", "libvpx")])
def test_a_live_recording_does_not_say_how_long_it_is(tmp_path, name, codec):
    path = encoded(tmp_path / name, codec, "yuv420p", muxer={"live": "1"})
    assert video.probe(path, LIMITS).frames == 20
    assert numbers(read(path)) == list(range(9))
    code, message = failure(video.probe, path, LimitSettings(max_frames=19))
    assert code == "too_many_frames" and "20 frames" in message


@pytest.mark.parametrize("degrees", [0, 90])
def test_pixels_that_are_not_square_are_shown_as_meant(tmp_path, degrees):
    """A square of 16 x 16 stored pixels of 2:1 is twice as wide as high."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[24:40, 24:40] = 255
    path = encoded(tmp_path / "v.mp4", "libx264", "yuv420p", image=image, aspect=Fraction(2))
    height, width = (64, 128) if degrees == 0 else (128, 64)
    seen = (
        read(turned(path, degrees) if degrees else path, height=height, width=width, frames=5)[0].float().mean(0) > 128
    )
    assert (int(seen.any(1).sum()), int(seen.any(0).sum())) == ((16, 32) if degrees == 0 else (32, 16))


def test_large_videos_say_how_their_colours_are_made(tmp_path):
    """Players take an untagged video of 720 lines for BT.709."""
    frames = torch.tensor([220, 60, 60], dtype=torch.uint8).view(1, 3, 1, 1).expand(5, 3, 720, 64)
    video.write(tmp_path / "v.mp4", frames, 12)
    with av.open(str(tmp_path / "v.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (6, 1, 1, 13)
    found = read(tmp_path / "v.mp4", height=720, width=64, frames=5, fps=12)
    assert (found.float().mean((0, 2, 3)) - torch.tensor([220.0, 60.0, 60.0])).abs().max() < 3


@pytest.mark.parametrize("size", [(51, 67), (2, 2), (16, 2048)])
def test_odd_tiny_and_narrow_clips_are_read(tmp_path, size):
    path = encoded(tmp_path / "v.mp4", "libx264", "yuv444p", size=size, options={"crf": "0"})
    assert numbers(read(path, height=48, width=80)) == list(range(9))


@pytest.mark.parametrize("source", [(64, 64), (64, 128), (128, 48), (50, 66)])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_frames_cover_the_size_and_are_cropped_at_the_centre(tmp_path, source, size):
    height, width = source
    frames = torch.zeros(5, 3, height, width, dtype=torch.uint8)
    frames[:, :, height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 255  # a square in the middle
    video.write(tmp_path / "v.mp4", frames, 10)
    found = read(tmp_path / "v.mp4", height=size[0], width=size[1], frames=5)[0, 1].float()
    assert found.shape == size
    rows, cols = (found > 127).nonzero(as_tuple=True)
    assert abs(rows.float().mean() - (size[0] - 1) / 2) < 1
    assert abs(cols.float().mean() - (size[1] - 1) / 2) < 1
    assert abs((rows.max() - rows.min()) - (cols.max() - cols.min())) <= 1  # not stretched


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    return functools.cache(lambda frames, rate: counting(folder / f"{frames}-{rate}.mp4", frames=frames, fps=rate))


@settings(max_examples=200)
@given(
    st.sampled_from([5, 6, 9, 24]),
    st.sampled_from([8.0, 12.0, 24000 / 1001, 24.0, 25.0, 29.97, 60.0]),
    st.sampled_from([8.0, 12.0, 16.0, 24.0, 30.0, 60.0]) | st.floats(1, 120),
    st.integers(0, 8),
    st.none() | st.integers(1, 30),
)
def test_what_planning_promises_reading_gives(counted, frames, rate, fps, start, end):
    path = counted(frames, rate)
    promised = video.clip_frames(video.probe(path, LIMITS), start, end, fps, 33)
    assert promised == 0 or (promised % 4 == 1 and promised <= 33)
    if promised < 5:
        return
    found = numbers(read(path, frames=promised, fps=fps, start=start, end=end))
    wanted = [start + n / fps * rate for n in range(promised)]
    assert all(abs(a - b) < 0.6 for a, b in zip(found, wanted, strict=True))  # the nearest frame
    assert found == sorted(found)


@pytest.mark.parametrize(("start", "end"), [(30, None), (0, 4), (18, None), (10, 12), (25, 40)])
def test_a_range_with_too_little_in_it_is_refused(tmp_path, start, end):
    path = counting(tmp_path / "v.mp4")
    assert video.clip_frames(video.probe(path, LIMITS), start, end, 10.0, 81) < 5
    assert failure(read, path, start=start, end=end, frames=5)[0] == "too_few_frames"


# ---- what is bad


@pytest.mark.parametrize("code", BAD)
def test_each_bad_file_has_its_own_code(tmp_path, code):
    path = tmp_path / "bad.mp4"
    BAD[code](path)
    found, message = failure(read, path)
    assert found == code
    assert "bad.mp4" in message


@pytest.mark.parametrize("code", sorted(set(BAD) - {"too_few_frames"}))
def test_planning_finds_them_as_well(tmp_path, code):
    BAD[code](tmp_path / "bad.mp4")
    assert failure(video.probe, tmp_path / "bad.mp4", LIMITS)[0] == code


@pytest.mark.parametrize("kind", MORE_BAD)
def test_other_bad_files(tmp_path, kind):
    code, write = MORE_BAD[kind]
    write(tmp_path / "bad.mp4")
    assert failure(read, tmp_path / "bad.mp4")[0] == failure(video.probe, tmp_path / "bad.mp4", LIMITS)[0] == code


class Sealed:
    """A container that nothing may be decoded from."""

    def __init__(self, container):
        self._container = container

    def __getattr__(self, name):
        assert name not in ("decode", "demux")
        return getattr(self._container, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()


@pytest.mark.parametrize(
    ("limits", "code", "name"),
    [
        ({"max_frames": 16}, "too_many_frames", "limits.max_frames=16"),
        ({"max_duration_s": 1}, "too_many_frames", "limits.max_duration_s=1"),
        ({"max_pixels": 4095}, "too_many_pixels", "limits.max_pixels=4095"),
    ],
)
@pytest.mark.parametrize(
    "look", [lambda path, limits: video.probe(path, limits), lambda path, limits: read(path, limits=limits)]
)
def test_limits_are_checked_before_anything_is_decoded(tmp_path, monkeypatch, look, limits, code, name):
    path = clip(tmp_path / "v.mp4")
    look(path, LimitSettings(max_frames=17, max_pixels=4096, max_duration_s=2))  # just within
    opened = video._open
    monkeypatch.setattr(video, "_open", lambda path: Sealed(opened(path)))
    found, message = failure(look, path, LimitSettings(**limits))
    assert found == code
    assert name in message


def test_the_limit_of_pixels_holds_all_along_the_file(tmp_path):
    path = growing(tmp_path / "v.ts", 48)
    assert read(path, frames=33).shape == (33, 3, 32, 32)
    for least, code in ((48 * 48 - 1, "too_many_pixels"), (32 * 32, "truncated")):  # not even decoded
        limits = LimitSettings(max_pixels=least)
        assert video.probe(path, limits).width == 32
        assert failure(read, path, frames=33, limits=limits)[0] == code


def test_no_file_is_missing(tmp_path):
    for path in (tmp_path / "nowhere.mp4", tmp_path):
        assert failure(read, path)[0] == failure(video.probe, path, LIMITS)[0] == "reference_missing"


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile '{target}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
        '<?xml version="1.0"?><MPD><BaseURL>{target}</BaseURL></MPD>',
    ],
)
def test_a_script_named_mp4_opens_no_other_file(tmp_path, script):
    clip(tmp_path / "secret.mp4")
    bad = tmp_path / "bad.mp4"
    for target in ("secret.mp4", tmp_path / "secret.mp4", f"file:{tmp_path}/secret.mp4"):
        bad.write_text(script.format(target=target))
        assert failure(read, bad)[0] == "not_a_video"


def test_the_same_frames_are_the_same_bytes_every_time(tmp_path):
    """libx264's macroblock tree gave other bytes in one of twenty files; the first file of a process above all."""
    frames = render(sample(11, category="multiple", frames=5, height=48, width=64))
    digests = set()
    for _ in range(80):
        video.write(tmp_path / "clip.mp4", frames, 12, preset="veryfast")
        digests.add(hashlib.sha256((tmp_path / "clip.mp4").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_the_same_frames_are_the_same_bytes_on_machines_of_any_size(tmp_path):
    frames = render(sample(11, category="multiple", frames=9, height=256, width=256))
    everywhere = os.sched_getaffinity(0)
    written = []
    try:
        for number in (1, 2):
            os.sched_setaffinity(0, sorted(everywhere)[:number])
            video.write(tmp_path / "clip.mp4", frames, 12)
            written.append((tmp_path / "clip.mp4").read_bytes())
    finally:
        os.sched_setaffinity(0, everywhere)
    assert written[0] == written[1]


@pytest.mark.parametrize("wrong", [{"fps": 0}, {"fps": -1}, {"start": -5}, {"height": 0}, {"frames": 0}])
def test_clips_that_cannot_be_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"no clip has .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        video.read(tmp_path / "v.mp4", **({"height": 32, "width": 32, "frames": 5, "fps": 12} | wrong))


@pytest.mark.parametrize(
    ("shape", "fps"), [((5, 3, 31, 32), 12), ((5, 4, 32, 32), 12), ((3, 32, 32), 12), ((5, 3, 32, 32), 0)]
)
def test_videos_that_cannot_be_are_not_written(shape, fps, tmp_path):
    with pytest.raises(ValueError, match=r"v\.mp4: (frames are|fps=)"):
        video.write(tmp_path / "v.mp4", torch.zeros(shape, dtype=torch.uint8), fps)
    assert not (tmp_path / "v.mp4").exists()
