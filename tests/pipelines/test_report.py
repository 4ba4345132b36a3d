"""The report page: what it may link to, what it does with hostile text, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipelines import tables
from pipelines.report import _curve, link, render
from schemas.errors import ErrorCode
from schemas.rows import ManifestRow, ResultRow
from support.rows import metric_row
from vmt_core.metrics.motion import packed

CHROMIUM = shutil.which("chromium")
METHODS = ("fastvmt", "ditflow", "none")
FPS, FRAMES, SIDE = 12.0, 17, 64
SUMMARY = {"notice": "noise", "manifest": "my manifest", "again": ["--adapters", "my adapters"], "model": "tiny"}
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def row(output: str = "out", *, failed: bool = False, **values: Any) -> dict[str, Any]:
    """A result row with everything that a run would fill in."""
    clip = {"reference_uri": "clips/line.mp4", "reference_digest": "ab" * 32, "start_frame": 0}
    size = {"fps": FPS, "height": SIDE, "width": SIDE, "frames": FRAMES}
    method = {"prompt": "a balloon", "method": "fastvmt", "method_settings": '{"start":{"kind":"noise"}}', "seed": 0}
    sampling = {"steps": 2, "shift": 3.0, "guidance_scale": 4.0}
    model = {"model": "wan-nano", "model_revision": "r1", "video_version": 1}
    planned = ManifestRow.planned(**clip | size | method | sampling | model | values)
    ended: dict[str, Any] = {
        "status": "ok",
        "video_uri": f"{output}/videos/method={planned.method}/{planned.sample_id}.mp4",
        "seconds_transfer": 2.5,
        "evaluations": 7,
    }
    if failed:
        code, message = ErrorCode.CRASHED, f"the worker died {ATTACK}"
        ended = {"status": "failed", "error_code": code, "error_message": message, "stage": "transfer", "attempts": 2}
    reference = f"{output}/references/{planned.reference_digest[:32]}.mp4"
    return ResultRow(**planned.model_dump(), **ended, reference_video_uri=reference).model_dump()


class Scripts(HTMLParser):
    """Collects the page's tags and the text of its scripts as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def inlined(page: str) -> list[dict[str, Any]]:
    """The rows that the page holds, unpacked as its script does."""
    data = json.loads(Scripts(page).scripts[0])
    return [
        {name: None if at < 0 else data["pool"][at] for name, at in zip(data["text"], values, strict=False)}
        | dict(zip(data["numbers"], values[len(data["text"]) :], strict=True))
        for values in data["rows"]
    ]


@pytest.mark.parametrize("where", ["prompt", "reference_uri", "category", "caption", "negative_prompt"])
def test_text_of_rows_cannot_break_out(where: str) -> None:
    page = render([row() | {where: ATTACK}], {}, "out")
    found = Scripts(page)
    assert len(found.scripts) == 2
    assert "img" not in found.tags
    assert inlined(page)[0][where] == ATTACK


def test_text_of_the_summary_is_escaped() -> None:
    texts = dict.fromkeys(("title", "run_id", "started_at", "model", "model_revision", "notice"), ATTACK)
    summary = {**texts, "versions": {ATTACK: ATTACK}, "failed": 1, "failed_by_code": {ATTACK: 1}}
    found = Scripts(render([], summary, "out"))
    assert len(found.scripts) == 2
    assert "img" not in found.tags


def test_only_the_pages_own_script_may_run() -> None:
    page = render([row()], {}, "out")
    nonces = set(re.findall(r"nonce[-=]\"?([0-9a-f]{32})", page))
    assert len(nonces) == 1
    assert "script-src 'nonce-" in page
    assert render([row()], {}, "out") == page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("uri", "output", "expected"),
    [
        ("out/videos/method=none/a.mp4", "out", "../videos/method=none/a.mp4"),
        ("/data/out/references/a.mp4", "/data/out/", "../references/a.mp4"),
        ("file:///data/out/references/a.mp4", "/data/out", "../references/a.mp4"),
        ("s3://bucket/out/videos/a #1?.mp4", "s3://bucket/out", "../videos/a%20%231%3F.mp4"),
        ("/data/out/run/javascript:alert(1)", "/data/out", "javascript%3Aalert%281%29"),
        ("/data/outside/a.mp4", "/data/out", "/data/outside/a.mp4"),
        ("/data/100%.mp4", "/data/out", "/data/100%25.mp4"),
        ("clips/a.mp4", "out", "../../clips/a.mp4"),
        ("https://example.com/a.mp4?b=1", "out", "https://example.com/a.mp4?b=1"),
        ("s3://bucket/out/../secret.mp4", "s3://bucket/out", None),
        ("s3://bucket/other/a.mp4", "s3://bucket/out", "../../other/a.mp4"),
        ("s3://elsewhere/out/a.mp4", "s3://bucket/out", None),
        ("javascript:alert(1)", "out", None),
        ("javascript:alert(1)", "s3://bucket/out", None),
        (" JavaScript:alert(1)", "out", None),
        ("java\nscript:alert(1)", "out", None),
        ("data:text/html,x", "out", None),
        ("//host/a.mp4", "s3://bucket/out", None),
        ("\\\\host\\a.mp4", "s3://bucket/out", None),
        ("", "out", None),
        (None, "out", None),
    ],
)
def test_links(uri: str | None, output: str, expected: str | None) -> None:
    assert link(uri, output) == expected


def test_videos_of_a_run_beside_the_page_are_linked_so_that_both_can_be_moved() -> None:
    runs = ["/data/a/out", "/elsewhere/out"]
    assert link("/data/a/out/videos/v.mp4", "/data/a/out/evaluation", "", runs) == "../videos/v.mp4"
    assert link("/data/a/out/videos/v.mp4", "/data/eval", "", runs) == "../a/out/videos/v.mp4"
    assert link("/elsewhere/out/v.mp4", "/data/eval", "", runs) == "/elsewhere/out/v.mp4"


def test_a_comparison_says_what_its_intervals_are_of_and_what_is_best() -> None:
    made = [
        metric_row(method, n, motion=value + 1e-4 * n, seconds=1.0)
        for method, value in (("none", 0.1), ("fastvmt", 0.1003))
        for n in range(3)
    ]
    lines = tables.compare([*made, metric_row("fastvmt", 7, motion=0.1, seconds=1.0)], "none")
    page = render([row()], {}, "out", lines=lines)
    assert "over 4 references, which are few" in page
    assert 'class="best">0.10030<' in page
    assert "+0.00030 [+0.00030, +0.00030], 3 pairs" in page
    assert "motion ↑" in page and "seconds a video (tuning not counted) ↓" in page
    one = tables.compare([one for one in made if one.reference_digest == "0"], "none")
    assert "over the videos of one reference" in render([row()], {}, "out", lines=one)


def test_a_comparison_has_a_table_for_each_category_where_there_are_several() -> None:
    made = [
        metric_row(method, n, category=category, motion=n / 10)
        for method in ("none", "fastvmt")
        for n, category in enumerate(("camera", "camera", "single"))
    ]
    page = render([row()], {}, "out", lines=tables.compare(made, "none"))
    single = page[page.index("<h3>single") : page.index("</details>", page.index("<h3>single"))]
    assert '<h3>camera <span class="muted">2 references</span></h3>' in page
    assert single.count('<td class="nowrap">1</td>') == 2 and ">0.200<" in single
    assert "By category" not in render([row()], {}, "out", lines=tables.compare(made[:2], "none"))


def test_what_was_never_measured_can_be_sorted_by_no_more() -> None:
    data = json.loads(
        Scripts(render([row() | {"metrics": {"motion": 0.5, "moving": None}}, row()], {}, "out")).scripts[0]
    )
    assert data["metrics"] == ["motion"]


def test_both_losses_of_a_stage_are_drawn_on_one_scale() -> None:
    drawn = _curve([(step, 1.0 - 0.1 * step, 0.5 if step == 5 else None) for step in range(11)])
    assert drawn["range"] == "0.05 to 1"
    assert drawn["validation"] == "120.0,41.9"


def test_a_forbidden_scheme_reaches_the_page_as_text_only() -> None:
    (shown,) = inlined(render([row() | {"video_uri": "javascript:alert(1)"}], {}, "out"))
    assert shown["video"] is None
    assert shown["video_uri"] == "javascript:alert(1)"


def test_missing_or_odd_values_do_not_crash() -> None:
    assert "Motion transfer" in render([], {}, "out")
    assert "Motion transfer" in render([{}, {"status": "ok"}, {"status": "failed"}], {}, "out")
    nothing = dict.fromkeys(
        ("title", "ok", "failed", "left", "seconds", "failed_by_code", "seconds_by_stage", "versions")
    )
    assert "Motion transfer" in render([row()], nothing, "out")
    odd = row() | {"guidance_loss_last": float("nan"), "prompt": "lone \ud800", "seed": 2**62 + 1}
    (shown,) = inlined(render([odd], {"title": "lone \ud800", "started_at": "soon"}, "out"))
    assert shown["guidance_loss_last"] is None
    assert shown["seed"] == str(2**62 + 1)
    render([odd], {}, "out").encode("utf-8")


def test_the_header_counts_what_the_summary_leaves_out() -> None:
    page = render([row(), row(seed=1, failed=True)], {"selected": 5}, "out")
    values = re.findall(r'class="name">([^<]*)</div><div class="value">([^<]*)<', page)
    assert values[:3] == [("Videos made", "1"), ("Failed", "1"), ("Left to do", "3")]


def test_a_run_that_had_nothing_to_make_tells_no_rate() -> None:
    page = render([row()], {"selected": 1, "videos_per_hour": 0.0, "seconds": 0.0}, "out")
    assert "Videos per hour" not in page and "Run time" not in page
    page = render([row()], {"selected": 1, "videos_per_hour": 90.0, "seconds": 40.0}, "out")
    assert "Videos per hour" in page and "Run time" in page


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*switches, "--disable-sync", "--no-first-run"]
        )
        yield found
        found.close()


def write_clip(path: Path, shade: int) -> None:
    """A moving bar, FRAMES long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in range(FRAMES):
            image = np.full((SIDE, SIDE, 3), shade, np.uint8)
            image[:, frame * 3 : frame * 3 + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def three_groups(output: Path) -> list[dict[str, Any]]:
    """3 references x 3 methods; the last video failed."""
    rows = []
    for number in range(3):
        digest = f"{number:064x}"
        for method in METHODS:
            failed = number == 2 and method == "none"
            values = {"reference_digest": digest, "reference_uri": f"/clips/clip{number}.mp4", "method": method}
            made = row(
                str(output), failed=failed, prompt=f"prompt {number} {ATTACK}", category=f"kind{number}", **values
            )
            rows.append(made)
            if not failed:
                write_clip(Path(made["video_uri"]), 40 + 20 * number)
        write_clip(Path(rows[-1]["reference_video_uri"]), 20)
    return rows


def opened(
    browser: Browser, output: Path, rows: list[dict[str, Any]], about: dict[str, Any] | None = None, **options: Any
) -> tuple[Page, list[str]]:
    """The report in a new tab, and the list that its errors and dialogs go to."""
    (output / "run").mkdir(parents=True, exist_ok=True)
    (output / "run" / "report.html").write_text(render(rows, SUMMARY | (about or {}), str(output)))
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
    page.goto((output / "run" / "report.html").as_uri())
    page.wait_for_selector(".group")
    return page, errors


def until(page: Page, condition: str) -> None:
    """Waits for a condition, without the `eval` that the page's policy forbids to `wait_for_function`."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"waited 10 s for: {condition}")


def moments(page: Page) -> list[float]:
    """Where the videos of the first group are, in seconds."""
    times: list[float] = page.evaluate(
        "[...document.querySelector('.group').querySelectorAll('video')].map((video) => video.currentTime)"
    )
    return times


def spread(times: list[float]) -> float:
    """How far apart the videos are, in frames, on the circle that the loop is."""
    length = FRAMES / FPS
    return max(min(abs(time - times[0]), length - abs(time - times[0])) for time in times) * FPS


def test_gallery_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    page, errors = opened(browser, tmp_path, three_groups(tmp_path))
    expect(page.locator(".group")).to_have_count(3)
    expect(page.locator(".card.result")).to_have_count(9)
    expect(page.locator(".card.reference")).to_have_count(3)
    expect(page.locator(".group h2").first).to_contain_text("prompt 0 </script>")

    failed = page.locator(".card.failed")
    expect(failed).to_have_count(1)
    expect(failed).to_contain_text("crashed")
    expect(failed).to_contain_text("the worker died </script>")
    table = page.locator("#failures tbody tr")
    expect(table).to_have_count(1)
    expect(table).to_contain_text("the worker died")

    page.get_by_text("ditflow", exact=True).first.click()
    expect(page.locator(".card.result")).to_have_count(3)
    assert {page.locator(".card.result").nth(i).get_attribute("data-method") for i in range(3)} == {"ditflow"}
    page.get_by_text("ditflow", exact=True).first.click()
    page.select_option("#category", "kind1")
    expect(page.locator(".group")).to_have_count(1)
    page.select_option("#category", "")
    page.select_option("#status", "failed")
    expect(page.locator(".card.result")).to_have_count(1)
    page.select_option("#status", "")

    page.keyboard.press("/")
    page.keyboard.type("clip2 prompt")  # both words, in reference and prompt
    until(page, "document.querySelectorAll('.group').length === 1")
    expect(page.locator(".group h2")).to_contain_text("prompt 2")
    page.fill("#search", "no such thing")
    until(page, "document.querySelectorAll('.group').length === 0")
    page.get_by_role("button", name="Clear filters").click()
    expect(page.locator(".group")).to_have_count(3)

    page.locator(".card.result summary").first.click()
    until(page, "document.querySelector('.card.result pre').textContent !== ''")
    settings = json.loads(page.locator(".card.result pre").first.text_content() or "")
    assert settings["method_settings"] == {"start": {"kind": "noise"}}
    assert settings["seed"] == 0
    assert errors == []


def test_tracks_are_drawn_over_the_videos_when_asked(browser: Browser, tmp_path: Path) -> None:
    rows = three_groups(tmp_path)
    across = torch.stack([torch.linspace(0, SIDE, FRAMES), torch.full((FRAMES,), 31.0)], -1)[:, None]
    tracks = packed((across, torch.ones(FRAMES, 1, dtype=torch.bool)), SIDE, SIDE, every=1)
    page, errors = opened(browser, tmp_path, [rows[0] | {"tracks": tracks, "reference_tracks": tracks}, *rows[1:]])
    painted = """[...document.querySelectorAll('canvas')].map((c) => c.width > 0
        && c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((value) => value))"""
    assert page.evaluate(painted) == [False, False]
    page.keyboard.press("t")
    until(page, f"{painted}.every(Boolean)")
    page.keyboard.press("t")
    until(page, f"!{painted}.some(Boolean)")
    assert [text for text in errors if not text.startswith("Canvas2D")] == []  # that is about how the test looks


def test_a_sample_has_a_page_of_its_own_that_says_how_to_make_it_again(browser: Browser, tmp_path: Path) -> None:
    rows = three_groups(tmp_path)
    page, errors = opened(browser, tmp_path, rows)
    page.get_by_role("link", name="Link").nth(4).click()
    until(page, "document.querySelectorAll('.card.result').length === 1")
    assert page.url.endswith(f"#{rows[4]['sample_id']}")
    again = page.locator(".again")
    expect(again).to_be_visible()
    expect(again).to_have_text(
        f"python jobs/transfer.py --manifest 'my manifest' --model tiny --adapters 'my adapters' "
        f"--output out/again --samples {rows[4]['sample_id']}"
    )
    assert errors == []


def test_clearing_filters_leaves_how_videos_play_and_a_link_works_twice(browser: Browser, tmp_path: Path) -> None:
    track = torch.full((FRAMES, 1, 2), 31.0)
    tracks = packed((track, torch.ones(FRAMES, 1, dtype=torch.bool)), SIDE, SIDE, every=1)
    rows = [made | {"tracks": tracks, "reference_tracks": tracks} for made in three_groups(tmp_path)]
    page, errors = opened(browser, tmp_path, rows)
    page.keyboard.press("t")
    page.select_option("#speed", "0.25")
    page.get_by_text("ditflow", exact=True).first.click()
    page.fill("#search", "no such thing")
    page.get_by_role("button", name="Clear filters").click()
    expect(page.locator(".card.result")).to_have_count(9)
    expect(page.locator("#tracks")).to_be_checked()
    expect(page.locator("#speed")).to_have_value("0.25")
    assert page.evaluate("[state.tracks, state.rate]") == [True, 0.25]

    for _ in range(2):
        page.get_by_role("link", name="Link").nth(4).click()
        expect(page.locator(".card.result")).to_have_count(1)
        page.fill("#search", "")
        expect(page.locator(".card.result")).to_have_count(9)
    assert [text for text in errors if not text.startswith("Canvas2D")] == []


def test_twins_say_what_tells_them_apart(browser: Browser, tmp_path: Path) -> None:
    """One method with two settings, and one pair of settings in two runs that are shown on one page."""
    fast, _, none, *_ = three_groups(tmp_path)
    settings = [{"method_settings": f'{{"guidance":{{"inner":{inner}}}}}'} for inner in (3, 5)]
    twins = [fast | values | {"run": run} for run in ("out/a", "out/b") for values in settings]
    page, errors = opened(browser, tmp_path, [none | {"run": "out/a"}, *twins])
    expect(page.locator(".differs")).to_have_text(
        [f'run="out/{name}" guidance.inner={inner}' for name in "ab" for inner in (3, 5)]
    )
    assert errors == []


def test_a_group_of_many_shows_the_rest_when_asked(browser: Browser, tmp_path: Path) -> None:
    fast, *_ = three_groups(tmp_path)
    twins = [fast | {"method_settings": f'{{"inner":{inner}}}', "sample_id": f"{inner:032x}"} for inner in range(1, 31)]
    page, errors = opened(browser, tmp_path, twins)
    expect(page.locator(".card.result")).to_have_count(12)
    page.get_by_role("button", name="12 more of 30").click()
    page.get_by_role("button", name="6 more of 30").click()
    expect(page.locator(".card.result")).to_have_count(30)
    expect(page.get_by_role("button", name="more of 30")).to_be_hidden()
    until(page, "[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)")
    page.fill("#search", '"inner":17')
    expect(page.locator(".card.result")).to_have_count(1)
    assert errors == []


def test_a_link_can_be_gone_back_from_and_says_if_it_leads_nowhere(browser: Browser, tmp_path: Path) -> None:
    page, errors = opened(browser, tmp_path, three_groups(tmp_path), {"ok": 50_000})
    expect(page.locator("#count")).to_contain_text("this page has 9 of 50,000 results")
    page.get_by_role("link", name="Link").nth(4).click()
    expect(page.locator(".card.result")).to_have_count(1)
    page.go_back()
    expect(page.locator(".card.result")).to_have_count(9)
    page.evaluate("location.hash = 'f'.repeat(32)")
    expect(page.locator("#count")).to_contain_text("is not on this page")
    page.get_by_role("link", name="Failed").click()
    expect(page.locator("#failures tbody tr")).to_be_in_viewport()
    assert errors == []


def test_a_video_that_could_not_be_measured_is_shown_with_the_reason(browser: Browser, tmp_path: Path) -> None:
    rows = three_groups(tmp_path)
    page, errors = opened(browser, tmp_path, [rows[0] | {"fault": "internal: no flow"}, *rows[1:]])
    card = page.locator(".card.result").first
    expect(card).to_contain_text("Not measured: internal: no flow")
    expect(card.locator("video")).to_have_count(1)
    assert errors == []


@pytest.mark.parametrize("height", [SIDE, 2 * SIDE])
def test_a_box_has_the_shape_of_its_video_at_every_width(browser: Browser, tmp_path: Path, height: int) -> None:
    """So that tracks lie on it."""
    rows = [made | {"height": height} for made in three_groups(tmp_path)]
    page, errors = opened(browser, tmp_path, rows)
    for width in (1280, 640, 400):
        page.set_viewport_size({"width": width, "height": 900})
        ratios = page.evaluate(
            "[...document.querySelectorAll('.screen:has(video)')].map((box) => box.clientWidth / box.clientHeight)"
        )
        assert ratios == pytest.approx([SIDE / height] * len(ratios), rel=0.01)
    assert errors == []


def test_videos_of_a_group_play_in_step(browser: Browser, tmp_path: Path) -> None:
    page, errors = opened(browser, tmp_path, three_groups(tmp_path))
    until(page, "[...document.querySelector('.group').querySelectorAll('video')].every((v) => v.currentTime > 0)")
    seen = []
    for _ in range(20):  # over more than one loop
        page.wait_for_timeout(100)
        seen.append(moments(page))
    assert len({round(times[0], 2) for times in seen}) > 5, "the videos stand still"
    assert max(spread(times) for times in seen) <= 2

    # one that is put out of step comes back, and not only where the loop begins anew
    page.select_option("#speed", "0.25")
    until(page, "document.querySelector('.group video').currentTime < 0.3")
    page.evaluate("document.querySelectorAll('.group video')[1].currentTime = 0.9")
    until(
        page,
        f"""(([first, second]) => first < 0.8 && Math.abs(first - second) <= {2 / FPS})(
            [...document.querySelectorAll('.group video')].map((video) => video.currentTime))""",
    )

    page.keyboard.press("Space")
    until(page, "[...document.querySelectorAll('video')].every((video) => video.paused && !video.seeking)")
    still = moments(page)
    assert spread(still) <= 2
    page.wait_for_timeout(300)
    assert moments(page) == still

    slider = page.locator(".group input[type=range]").first
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    until(page, "[...document.querySelector('.group').querySelectorAll('video')].every((v) => !v.seeking)")
    assert moments(page) == pytest.approx([1.5 / FPS] * 4, abs=0.02)
    assert errors == []


def test_reduced_motion_does_not_start_by_itself(browser: Browser, tmp_path: Path) -> None:
    page, errors = opened(browser, tmp_path, three_groups(tmp_path), reduced_motion="reduce")
    until(page, "document.querySelector('video').readyState >= 2")
    page.wait_for_timeout(300)
    assert moments(page) == [0] * 4
    page.get_by_role("button", name="Play", exact=True).click()
    until(page, "document.querySelector('video').currentTime > 0")
    assert errors == []


def test_ten_thousand_rows(browser: Browser, tmp_path: Path) -> None:
    base = three_groups(tmp_path)
    rows = [
        base[n % 9] | {"seed": n // 9, "sample_id": f"{n:032x}", "metrics": {"motion": n / 1e4}} for n in range(10_000)
    ]
    page, errors = opened(browser, tmp_path, rows)
    assert 0 < page.locator(".card").count() < 200
    page.fill("#search", "clip1")
    until(page, "document.getElementById('count').textContent.startsWith('3,33')")
    # far down: more groups are drawn, those left behind let go of their videos
    until(
        page,
        """document.getElementById('more').scrollIntoView() || document.querySelectorAll('.group').length > 48""",
    )
    until(page, "document.querySelectorAll('video[src]').length < 75")
    assert errors == []
