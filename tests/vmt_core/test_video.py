"""Video files in and out."""

import itertools

import av
import pytest
import torch

from schemas import LimitSettings, RowError
from support.clips import BAD, MORE_BAD, clip, counting, numbers, variable_rate
from vmt_core import video
from vmt_core.world.clips import render

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
    frames = render("circle", frames=17, height=96, width=160)
    video.write(tmp_path / "v.mp4", frames, fps)
    info = video.probe(tmp_path / "v.mp4", LIMITS)
    assert (info.width, info.height, info.frames, info.codec) == (160, 96, 17, "h264")
    assert info.fps == pytest.approx(fps, abs=1e-3)
    back = video.read(tmp_path / "v.mp4", height=96, width=160, frames=17, fps=info.fps)
    error = (back.float() - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 30  # dB; yuv420p halves the colours


def test_it_plays_before_it_is_loaded_and_says_what_it_is(tmp_path):
    path = tmp_path / "v.mp4"
    tags = {"comment": "AI-generated", "sample_id": "ab", "method": "fastvmt", "model": "wan-nano"}
    video.write(path, render("line", frames=5, height=32, width=32), 12, tags=tags)
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


@pytest.mark.parametrize("fps", [5.0, 10.0, 20.0, 7.5])
def test_a_rate_picks_the_frame_that_is_shown_at_that_time(tmp_path, fps):
    path = counting(tmp_path / "v.mp4")
    expected = [int(n / fps * 10 + 0.5 - 1e-6) for n in range(9)]
    found = numbers(read(path, fps=fps))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    assert found == sorted(found)
    if fps in (5.0, 10.0):
        assert found == [round(n * 10 / fps) for n in range(9)]


def test_a_range_far_into_a_long_clip(tmp_path):
    path = tmp_path / "v.mp4"
    levels = (torch.arange(120) % 25 * 10 + 5).to(torch.uint8)
    video.write(path, levels.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous(), 10, crf=0)
    assert numbers(read(path, start=100, frames=5)) == [n % 25 for n in range(100, 105)]


def test_variable_frame_rates_are_read_by_time(tmp_path):
    path = variable_rate(tmp_path / "v.mp4", [0, 1, 2, 6, 7, 8, 9, 10, 11, 12])
    assert numbers(read(path)) == [0, 1, 2, 2, 2, 2, 3, 4, 5]


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


def test_promised_frames_can_be_read(tmp_path):
    """`clip_frames`, which plans, never promises more than `read` gives."""
    for frames, rate in itertools.product([5, 8, 20], [10.0, 24.0]):
        path = counting(tmp_path / "v.mp4", frames=frames, fps=rate)
        info = video.probe(path, LIMITS)
        for fps, start, end in itertools.product([5.0, 10.0, 12.0, 24.0, 30.0], [0, 2], [None, 7]):
            promised = video.clip_frames(info, start, end, fps, 81)
            assert promised <= 81
            if promised >= 5:
                assert promised % 4 == 1
                assert len(read(path, frames=promised, fps=fps, start=start, end=end)) == promised


# ---- what is bad


@pytest.mark.parametrize("code", BAD)
def test_each_bad_file_has_its_own_code(tmp_path, code):
    path = tmp_path / "bad.mp4"
    BAD[code](path)
    found, message = failure(read, path)
    assert found == code
    assert "bad.mp4" in message


@pytest.mark.parametrize("kind", MORE_BAD)
def test_other_bad_files(tmp_path, kind):
    code, write = MORE_BAD[kind]
    write(tmp_path / "bad.mp4")
    assert failure(read, tmp_path / "bad.mp4")[0] == code


@pytest.mark.parametrize(
    ("limits", "code", "name"),
    [
        ({"max_frames": 16}, "too_many_frames", "limits.max_frames=16"),
        ({"max_duration_s": 1}, "too_many_frames", "limits.max_duration_s=1"),
        ({"max_pixels": 4095}, "too_many_pixels", "limits.max_pixels=4095"),
    ],
)
def test_limits_are_checked_before_anything_is_decoded(tmp_path, monkeypatch, limits, code, name):
    path = clip(tmp_path / "v.mp4")
    monkeypatch.setattr(video, "_timed", None)
    found, message = failure(read, path, limits=LimitSettings(**limits))
    assert found == code
    assert name in message


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile '{target}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
        '<?xml version="1.0"?><MPD><BaseURL>{target}</BaseURL></MPD>',
    ],
)
def test_a_script_named_mp4_opens_no_other_file(tmp_path, script):
    target = clip(tmp_path / "secret.mp4")
    bad = tmp_path / "bad.mp4"
    bad.write_text(script.format(target=target))
    assert failure(read, bad)[0] == "not_a_video"
