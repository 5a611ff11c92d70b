"""The report of runs, from what made-up runs have written down."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax.engine.held_out import Assessment
from mixgrpo_jax.report import folders
from mixgrpo_jax.runtime import intervals, page, runs
from tests.python import ROOT

NASTY = "</script><script>alert('a sign')</script> & \"quotes\""
DATA = re.compile('<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def made_up(workdir, iterations=300, every=10, side=96, count=40, seed=0):
    """A run that gets better: its metrics, config, warnings, and held-out pictures of noise, the hardest to pack."""
    rng = np.random.default_rng(seed)
    lines = []
    (workdir / "held_out").mkdir(parents=True)
    ability, gain = rng.normal(0, 0.1, count), rng.uniform(-0.5, 1.5, count)
    for iteration in range(iterations + 1):
        done = iteration / iterations
        line = {"iteration": iteration}
        if iteration:
            for name in ("reward/ocr", "watched/strict"):
                line |= {f"{name}/mean": done + 0.1, f"{name}/std": 0.3, f"{name}/within": 0.2}
            line |= {
                "grad_norm": rng.gamma(2.0),
                "kl/base": done,
                "ratio/clip_fraction": rng.random(),
                "window/length": 3,
            }
            line |= {
                "window/start": iteration // 12,
                "nfe/rollout": 1920 - iteration,
                "nfe/update": 576,
                "nfe/gradient": 576,
            }
            line |= {f"time/{phase}": rng.random() for phase in ("rollout", "reward", "update")}
            line |= {"time/device_seconds": 2.0, "time/images_per_second": 40.0, "monitor/sharpness": rng.random()}
        if iteration == 7:
            line["reward/ocr/mean"] = line["reward/ocr/within"] = None
        if iteration % every == 0 or iteration == iterations:
            scores = {"ocr": ability + gain * done, "strict": (ability + gain * done > 0.5).astype(float)}
            scores["ocr"][3] = np.nan
            images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
            Assessment(images, scores).excerpt().save(workdir / "held_out" / f"{iteration}.npz")
            line |= {f"held_out/{name}/mean": float(np.nanmean(values)) for name, values in scores.items()}
            line |= {f"held_out/{name}/std": float(np.nanstd(values)) for name, values in scores.items()}
        lines.append(line)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    warning = {"iteration": 9, "monitor": "sharpness", "message": f"is 3 times the base model's: {NASTY}"}
    (workdir / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    (workdir / "warnings").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(workdir / "warnings" / "9_sharpness.png")
    changed = {"iteration": 5, "changed": {"optimizer.learning_rate": [1e-5, 2e-5]}}
    (workdir / "history.jsonl").write_text(json.dumps(changed) + "\n")
    config = {"seed": seed, "iterations": iterations, "rewards": {"ocr": 1.0}, "model": {"folder": NASTY}}
    (workdir / "config.json").write_text(json.dumps(config))
    prompts = [NASTY, *(f"a sign that says {n}" for n in range(1, count))]
    (workdir / "held_out" / "prompts.json").write_text(json.dumps(prompts))
    return lines


def read(path):
    """The file's text, and the data of its charts and pictures, which are strict JSON."""
    text = path.read_text()
    return text, json.loads(DATA.search(text)[1], parse_constant=pytest.fail)


def chart(data, title):
    return next(c for section in data["sections"] for c in section["charts"] if c["title"] == title)


def test_a_page_tells_what_a_run_has_written_down(tmp_path):
    workdir = tmp_path / "run"
    lines = made_up(workdir)
    page.refresh_report(workdir)
    text, data = read(workdir / "report.html")
    assert len(text) < 5e6 and page.BUDGET / 3 < sum(map(len, re.findall('data:image/webp[^"]*', text))) < page.BUDGET

    # Nothing is asked for from elsewhere, and no text of the run is markup.
    assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"https://github.com/leeoniya/uPlot"}
    assert (
        not re.findall(r"""(?:src|href)=["']?(?!data:|#)[\w./]|@import|url\(""", text) and "default-src 'none'" in text
    )
    assert "<script>alert" not in text and text.count("</script>") == 3
    visible = html.unescape(text)
    assert f"is 3 times the base model's: {NASTY}" in visible and "1 warning" in visible
    assert "<li>iteration 9, <b>sharpness</b>" in text and '<img src="data:image/webp' in text
    for section in (
        "Result",
        "Same prompts and seeds",
        "Before and after",
        *(s[0] for s in page.SECTIONS[:-1]),
        "Cost",
    ):
        assert f"<h2>{section}" in text
    for said in ("window/length 3", "optimizer.learning_rate 1e-05 → 2e-05", "not trained on", "10 min 0 s", "172,800"):
        assert said in visible, said

    assert chart(data, "window/start")["curves"][0]["y"] == [iteration // 12 for iteration in range(1, 301)]
    reward = chart(data, "reward/ocr")["curves"][0]
    assert reward["x"] == list(range(1, 301)) and reward["y"][6] is reward["low"][6] is reward["high"][6] is None
    mean = np.array([line["reward/ocr/mean"] for line in lines[8:]])
    for name, expected in (("y", mean), ("low", mean - 0.2), ("high", mean + 0.2)):
        np.testing.assert_allclose(reward[name][7:], expected, rtol=1e-4)
    held_out = chart(data, "held_out/ocr")["curves"][0]
    with np.load(workdir / "held_out" / "150.npz") as file:
        interval = intervals.bootstrap(file["ocr"])
    assert held_out["x"][15] == 150
    np.testing.assert_allclose([held_out[name][15] for name in ("y", "low", "high")], interval, rtol=1e-4)

    (run,) = data["runs"]
    assert [frame["iteration"] for frame in run["frames"]][:: len(run["frames"]) - 1] == [0, 300]
    first, middle, last = (run["frames"][i]["pictures"] for i in (0, 1, -1))
    assert first.keys() == last.keys() == run["prompts"].keys() and middle.keys() == set(run["strip"]) < first.keys()
    assert run["prompts"]["0"] == NASTY and last["3"]["scores"][0] is None and first["3"]["scores"] == [None, 0]


def test_long_runs_are_drawn_by_means_of_neighbours():
    lines = [{"iteration": n, "a": None if 4 <= n < 8 else float(n)} for n in range(10)]
    run = runs.Run("run", lines, {}, [], [], [], [])
    assert page._curve(run, "a", 5) == {"x": [1, 3, 5, 7, 9], "y": [0.5, 2.5, None, None, 8.5]}
    assert page._curve(run, "a", 3) == {"x": [3, 7, 9], "y": [1.5, None, 8.5]}
    assert page._curve(run, "none", 3)["y"] == []


def test_runs_are_compared_and_a_sweep_is_its_runs(tmp_path, monkeypatch):
    names = ["a", "b,seed=2"]
    first, second = (tmp_path / "sweep" / name for name in names)
    for folder, seed in ((first, 1), (second, 2)):
        made_up(folder, iterations=4, every=2, side=16, seed=seed)
    for name in ("warnings.jsonl", "config.json", "held_out/prompts.json"):
        (second / name).unlink()
    (second / "held_out" / "2.npz").write_bytes(b"broken")
    command = [sys.executable, "-m", "mixgrpo_jax.report", f"--workdir={tmp_path / 'sweep'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'sweep' / 'report.html'}\n" and "2.npz cannot be read" in done.stderr
    text, data = read(tmp_path / "sweep" / "report.html")
    assert [run["name"] for run in data["runs"]] == names and "<title>2 runs" in text
    assert [len(run["frames"]) for run in data["runs"]] == [3, 2]
    assert [curve["x"] for curve in chart(data, "grad_norm")["curves"]] == [[1, 2, 3, 4]] * 2
    assert "<tr><th>seed<td>1<td>None" in text and '<span title="b,seed=2">b,seed=2</span>' in text

    assert "<tr><th>run<th>iterations<th>model.folder<th>rewards.ocr<th>seed<th>done" in text
    monkeypatch.setattr(page, "BESIDE", 3)
    monkeypatch.setattr(page, "BUDGET", 100)  # less than any picture
    page.write(tmp_path / "report.html", [first, second])
    text = (tmp_path / "report.html").read_text()
    assert "<tr><th>run<th>done" in text and "4 settings differ, see" in text
    assert [run["frames"] for run in read(tmp_path / "report.html")[1]["runs"]] == [[], []]
    assert folders([f"{first},{tmp_path}", str(second)]) == [first, tmp_path, second]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' holds no metrics\.jsonl"):
        page.write(tmp_path / "report.html", [tmp_path / "empty"])


def test_a_report_that_fails_is_a_warning(tmp_path, capsys):
    page.refresh_report(tmp_path)
    assert "WARNING: report.html is not written: ValueError:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_excerpt_has_all_scores_and_few_pictures():
    scores = {"a": np.arange(600.0)}
    small = Assessment(np.zeros((600, 16, 48, 3), np.uint8), scores).excerpt()
    assert small.images.shape == (455, 16, 48, 3) and small.scores is scores
    large = np.zeros((30, 64, 32, 3), np.uint8)
    large[:, :32] = 200
    kept = Assessment(large.repeat(16, 1).repeat(16, 2), scores).excerpt(edge=64)
    np.testing.assert_array_equal(kept.images, large[:24])


@pytest.mark.slow
def test_a_browser_shows_it(tmp_path):
    """At a phone's and a desktop's width, light and dark: no error, no request; slider, sorting and charts work."""
    api = pytest.importorskip("playwright.sync_api", reason="the extra `test` has playwright")
    browser_path = shutil.which("chromium")
    if not browser_path:
        pytest.skip("chromium is not installed: apt-get install chromium")
    made_up(tmp_path / "runs" / "a", side=24)
    made_up(tmp_path / "runs" / "b", iterations=100, side=24, seed=1)
    page.write(tmp_path / "one.html", [tmp_path / "runs" / "a"])
    page.write(tmp_path / "two.html", [tmp_path / "runs"])
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name in ("one", "two"):
            grounds = {}
            for width in (390, 1440):
                for scheme in ("light", "dark"):
                    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                    errors, requests = [], []
                    tab.on("console", lambda message, errors=errors: errors.append(message.text))
                    tab.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
                    tab.on("dialog", lambda dialog, errors=errors: (errors.append(dialog.message), dialog.dismiss()))
                    tab.on("request", lambda request, requests=requests: requests.append(request.url))
                    tab.goto(f"file://{tmp_path}/{name}.html")
                    check_page(tab, compares=name == "two")
                    assert not errors and [url for url in requests if not url.startswith("data:")] == [tab.url]
                    assert tab.evaluate("document.documentElement.scrollWidth") == width
                    grounds[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
                    tab.close()
            assert grounds["light"] != grounds["dark"]
        browser.close()


def check_page(tab, compares):
    charts = tab.locator(".chart canvas")
    assert charts.count() == tab.locator(".chart").count() > 10
    drawn = "all => all.map(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v))"
    assert all(charts.evaluate_all(drawn))

    picture, slider = tab.locator("#strip img").first, tab.locator("#strip input")
    slider.evaluate("s => { s.value = 0; s.dispatchEvent(new Event('input')) }")
    before = picture.get_attribute("src")
    assert tab.locator("#strip output").inner_text() == "iteration 0"
    slider.press("ArrowRight")
    assert tab.locator("#strip output").inner_text() != "iteration 0"
    slider.press("End")
    assert tab.locator("#strip output").inner_text() == "iteration 300"
    assert picture.get_attribute("src") != before

    def changes():
        cells = tab.locator("#pairs .pair tr:first-child td:last-child").all_inner_texts()
        return [float(text or 0) for text in cells]  # one prompt has no score

    tab.get_by_label("score").select_option(label="ocr")
    best = changes()
    assert len(best) == 12 and best == sorted(best, reverse=True) and best[0] > 1
    tab.get_by_label("order").select_option(label="worst change first")
    assert changes() == sorted(changes()) and changes()[0] < 0
    tab.get_by_role("button", name="Show more").click()
    assert len(changes()) > 12
    tab.get_by_label("order").select_option(label="in their order")
    assert tab.locator("#pairs .pair p").first.inner_text() == " ".join(NASTY.split())

    if compares:

        def listed():
            return tab.locator("table.sortable tbody th").all_inner_texts()

        for expected in (["a", "b"], ["b", "a"]):  # more first, then less
            tab.locator("table.sortable thead th", has_text="done").click()
            assert listed() == expected
