"""The report: what is read from the folders of runs, what is written, and what is never written."""

import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import av
import numpy as np
import pytest
import runs as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import in_order
from runfolders import CLOSE, SCRIPT, write_eval, write_films, write_hostile_run, write_run

import causalvae
from causalvae.cli import main
from causalvae.config import TrainSettings
from causalvae.data.encode import write_video
from causalvae.flagtext import default_texts
from causalvae.metrics import psnr
from causalvae.report import films
from causalvae.report.build import build_report, json_in_html, read_texts
from causalvae.report.charts import STRETCHES, thin
from causalvae.report.evals import read_eval, run_evals
from causalvae.report.records import read_run
from causalvae.report.views import run_view
from causalvae.report.watch import Watch

SOURCE = Path(causalvae.__file__).parents[1]
DEFAULTS = {"max_steps": "50000", "betas": "0.9 0.999", "exp_name": "causalvae"}


def data_of(page: bytes) -> dict:
    found = re.search(rb'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the command made, with films and evaluations."""
    folder = tmp_path_factory.mktemp("trained")
    done = tiny.run(folder, max_steps=4, eval_steps=2, eval_video_path="sample:heldout", clip_grad=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_a_run_of_the_command_has_all_it_left_on_its_page(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert main("report", [str(trained), "--out", str(out)]) == 0
    page, data = out.read_bytes(), data_of(out.read_bytes())
    names = {chart["name"] for chart in data["charts"]}
    logged = set().union(*(json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()))
    measured = json.loads((trained / "eval/step-00000004.json").read_text())["weights"]["ema"]
    evaluated = measured["metrics"].keys() | measured["curves"].keys()
    assert names == logged - {"step", "time", "cursor"} | evaluated
    assert "psnr" in evaluated
    total = next(chart for chart in data["charts"] if chart["name"] == "total")
    assert total["series"][0]["x"] == [1, 2, 3, 4]
    assert [event["step"] for event in data["runs"][0]["events"] if event["kind"] == "checkpoint"] == [2, 4]
    assert [[each["step"] for each in clip["versions"]] for clip in data["players"]] == [[2, 4]] * 3
    assert sorted(clip["name"] for clip in data["players"]) == ["", "", "city_spire.mp4#0"]
    changed = {row["name"] for row in view(trained)["changed"]}
    assert {"max_steps", "clip_grad", "perceptual"} <= changed
    assert changed.isdisjoint({"seed", "betas", "optim"})
    assert b"--max_steps 4" in page
    fingerprint = json.loads((trained / "run.json").read_text())["dataset"]["fingerprint"]
    assert fingerprint.encode() in page


def view(run: Path) -> dict:
    return run_view(read_run(run), [], defaults=default_texts(TrainSettings))


def test_the_page_names_no_address_but_those_inside_the_chart_library(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    page = build_report([run], defaults=DEFAULTS).page.decode()
    scripts = re.findall(r"<script>.*?</script>", page, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        page = page.replace(script, "")
    assert re.findall(r"https?://|url\(|@import|<link(?! rel=\"icon\")|src=", page) == []
    assert "default-src &#39;none&#39;" in page
    assert "connect-src &#39;none&#39;" in page
    assert "https:" not in scripts[1]
    assert "innerHTML" not in scripts[1]


def test_nothing_of_a_hostile_run_is_markup(tmp_path: Path) -> None:
    run = write_hostile_run(tmp_path)
    page = build_report([run], defaults=DEFAULTS).page.decode()
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert markup.count("<script") == markup.count("</script") == 1  # the data
    assert SCRIPT not in page
    assert CLOSE not in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "&lt;img src=x onerror=window.__pwned=1&gt;" in page
    events = data_of(page.encode())["runs"][0]["events"]
    assert any(SCRIPT in event["text"] for event in events)


def test_json_in_a_page_has_no_character_that_begins_markup() -> None:
    text = json_in_html({"<!--": "</script>&amp;\u2028\u2029\udcff"})
    assert set("<>&\u2028\u2029").isdisjoint(text)
    assert text.isascii()
    assert json.loads(text) == {"<!--": "</script>&amp;\u2028\u2029\udcff"}


def test_a_long_curve_keeps_its_lowest_and_highest_and_its_mean() -> None:
    y = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[31_234] = 99.0
    thinned = thin(list(range(50_000)), y.tolist())
    assert len(thinned["x"]) <= 2 * STRETCHES
    assert thinned["y"][thinned["x"].index(31_234)] == 99.0
    assert min(thinned["y"]) == pytest.approx(float(y.min()), rel=1e-4)
    assert thinned["x"] == sorted(thinned["x"])
    # 50,000 / 700 is no whole number, so stretches weigh a little differently
    assert sum(thinned["my"]) / STRETCHES == pytest.approx(float(y.mean()), abs=2e-3)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=40))
def test_a_short_curve_stays_as_it_is_with_its_gaps(values: list[float | None]) -> None:
    thinned = thin(list(range(len(values))), values)
    assert thinned["x"] == list(range(len(values)))
    assert [value is None for value in thinned["y"]] == [value is None for value in values]
    pairs = [(a, b) for a, b in zip(thinned["y"], values, strict=True) if b is not None]
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)


def test_both_kinds_of_evaluation_files_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100, saves=2)
    simple = {
        "step": 60,
        "weights": "ema",
        "psnr": 25.0,
        "clips": [{"video": "good", "psnr": 27.0}, {"video": "bad", "psnr": 23.0}],
        "unreadable": [{"video": "none", "reason": "no frames"}],
    }
    (run / "eval/step-00000060.json").write_text(json.dumps(simple))
    whole = json.loads((run / "eval/step-00000100.json").read_text())
    both = {"step": 80, "weights": {"ema": whole, "live": whole | {"metrics": {"psnr": {"mean": 1.0}}}}}
    (run / "eval/step-00000080.json").write_text(json.dumps(both))
    found = run_evals(read_run(run), 0)
    assert [(each.step, each.weights) for each in found] == [
        (50, "ema"), (60, "ema"), (80, "ema"), (80, "live"), (100, "ema"),
    ]  # fmt: skip
    assert found[1].metrics["psnr"]["mean"] == 25.0
    assert [clip["name"] for clip in found[1].clips] == ["bad", "good"]
    assert found[3].metrics == {"psnr": {"mean": 1.0}}
    assert [clip["name"] for clip in found[4].clips] == ["clip 1.mp4#0", "clip 2.mp4#0", "clip 0.mp4#0"]


def test_an_evaluation_file_may_stand_beside_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    file = write_eval(tmp_path / "other.json", step=7, psnr=33.25)
    page = build_report([run, file], defaults=DEFAULTS).page.decode()
    assert "33.25" in page
    assert read_eval(file, notes=[])[0].label == "model.safetensors"


def test_a_damaged_run_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    (run / "run.json").write_text("[" * 100_000)
    (run / "config.yaml").write_text("a: [")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "total": 1e400, "pixel": "nan", "kl": true}\nno json\n[1]\n{"step": 1')
    (run / "eval/step-00000100.json").write_text('{"step": "x"}')
    write_films(run, steps=[100], clips=1)
    (run / "samples/step-00000100-clip1.mp4").write_bytes(b"no film")
    (run / "samples/step-00000100-clip2.mp4").symlink_to(run / "samples/step-00000100-clip0.mp4")
    report = build_report([run], defaults=DEFAULTS)
    said = "\n".join(report.notes)
    for each in ("run.json", "config.yaml", "metrics.jsonl: 2 lines", "holds no metrics", "clip1.mp4"):
        assert each in said
    assert report.clips == 1
    total = next(chart for chart in data_of(report.page)["charts"] if chart["name"] == "total")
    assert total["series"][0]["y"][-1] is None


def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run = str(write_run(tmp_path / "run", max_steps=100))
    for words, text in (
        ([], "name the folder of a run"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty: not the folder of a run"),
        ([run, "--lang", "de"], "--lang de: must be one of en, zh"),
        ([run, "--out", "run/log.txt/page.html"], "can't be written"),
    ):
        status = main("report", words)
        assert status in (1, 2)
        said = capsys.readouterr()
        assert re.fullmatch(r"error: [^\n]+\n", said.err), said.err
        assert text in said.err
        assert said.out == ""
    assert not (tmp_path / "report.html").exists()
    assert main("watch", []) == 2
    assert "causalvae watch: name the folder of a run" in capsys.readouterr().err


def test_without_the_chart_library_the_error_names_the_extra(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    packages = tmp_path / "packages"
    packages.mkdir()
    for item in Path(av.__file__).parents[1].iterdir():
        if not item.name.startswith(("plotly", "__editable__")):
            (packages / item.name).symlink_to(item)
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{packages}"}
    program = "from causalvae.cli import main; import sys; sys.exit(main('report', sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, str(run)],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: causalvae report needs its extra: pip install 'causalvae[report]'\n"


def test_a_report_imports_neither_torch_nor_the_chart_library(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    program = (
        "from causalvae.cli import main; import sys; main('report', sys.argv[1:]);"
        "sys.exit(bool({'torch', 'plotly'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(run), "--out", str(tmp_path / "page.html")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_both_languages_have_the_same_words() -> None:
    english, chinese = read_texts("en"), read_texts("zh")
    assert english.keys() == chinese.keys()
    same = {key for key in english if english[key] == chinese[key]}
    assert same <= {"metric.psnr", "metric.ssim"}


def test_every_frame_of_a_film_is_in_its_sprite_in_order(tmp_path: Path) -> None:
    write_films(tmp_path, steps=[10, 20], clips=1, frames=9, size=64)
    (clip,) = films.players(films.samples(tmp_path, 0), notes=[])
    film = in_order(tmp_path / "samples/step-00000020-clip0.mp4")
    shown = sprite_frames(clip, clip["versions"][-1]["film"])
    original = sprite_frames(clip, clip["original"])
    assert shown.shape == original.shape == (9, 64, 64, 3)
    for frame in range(9):
        # measured 4.9 and 7.5 of 255: WebP halves the colours' resolution, which small pictures feel most
        assert error(original[frame], film[frame, :, :64]) < 6.0
        assert error(shown[frame], film[frame, :, 64:]) < 12.0
    nearest = [min(range(9), key=lambda n: error(original[frame], film[n, :, :64])) for frame in range(9)]
    assert nearest == list(range(9))
    expected = [
        psnr(film[frame, :, :64].contiguous(), film[frame, :, 64:].contiguous()) for frame in range(9)
    ]
    assert clip["versions"][-1]["psnr"] == pytest.approx(expected, abs=0.006)


def test_films_of_another_shape_than_the_last_are_left_out(tmp_path: Path) -> None:
    write_films(tmp_path, steps=[10], clips=1, frames=9, size=64)
    write_films(tmp_path, steps=[20], clips=1, frames=5, size=64)
    write_films(tmp_path, steps=[30, 40], clips=1, frames=9, size=32)
    (clip,) = films.players(films.samples(tmp_path, 0), notes=[])
    assert [each["step"] for each in clip["versions"]] == [30, 40]
    assert (clip["height"], clip["width"], clip["frames"]) == (32, 32, 9)


def sprite_frames(clip: dict, text: str) -> np.ndarray:
    with av.open(io.BytesIO(base64.b64decode(text)), "r", format="webp_pipe") as container:
        sheet = next(container.decode(video=0)).to_ndarray(format="rgb24")
    h, w, columns = clip["height"], clip["width"], clip["columns"]
    places = [(n // columns * h, n % columns * w) for n in range(clip["frames"])]
    return np.stack([sheet[y : y + h, x : x + w] for y, x in places])


def error(a: np.ndarray, b: torch.Tensor) -> float:
    return float(np.abs(a.astype(int) - b.numpy().astype(int)).mean())


def test_films_of_noise_are_made_small_enough(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    noise = torch.randint(
        0, 256, (5, 64, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    path = tmp_path / "samples/step-00000001-clip0.mp4"
    write_video(path, noise)
    for clip in range(3):
        for step in range(1, 10):
            copy = tmp_path / f"samples/step-{step:08d}-clip{clip}.mp4"
            if copy != path:
                copy.hardlink_to(path)
    known: films.Sprites = {}
    whole = films.sprite_bytes(films.players(films.samples(tmp_path, 0), notes=[]))
    clips = films.players(films.samples(tmp_path, 0), notes=[], known=known, num_bytes=whole // 3)
    assert films.sprite_bytes(clips) <= whole // 3
    assert all(len(clip["versions"]) == films.MAX_VERSIONS for clip in clips)
    encoded = len(known)
    assert films.players(films.samples(tmp_path, 0), notes=[], known=known, num_bytes=whole // 3) == clips
    assert len(known) == encoded  # nothing was encoded again


@contextmanager
def served(run: Path) -> Iterator[Watch]:
    server = Watch([run], defaults=DEFAULTS, lang="en", every=1.0, port=0)
    thread = Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def ask(
    server: Watch, path: str, *, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    try:
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.port}"})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_server_answers_this_machine_with_the_secret_and_nobody_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    with served(run) as server:
        path = server.address.removeprefix(f"http://127.0.0.1:{server.port}")
        assert len(path) > 20
        status, headers, body = ask(server, path)
        assert status == 200
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert b"connect-src &#39;self&#39;" in body
        assert ask(server, path, host=f"localhost:{server.port}")[0] == 200
        for host in (
            "evil.example",
            f"evil.example:{server.port}",
            "127.0.0.1",
            f"127.0.0.1.evil:{server.port}",
        ):
            assert ask(server, path, host=host)[0] == 403
        for wrong in (
            "/",
            "/wrong/",
            path[:-2] + "/",
            path + "run.json",
            path + "../run.json",
            path + "%2e%2e/x",
        ):
            assert ask(server, wrong)[0] == 404
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert ask(server, path, method=method)[0] == 501


def test_the_server_shows_a_new_page_after_a_change_and_only_then(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    with served(run) as server:
        first, page = server.answer("version"), server.page()
        assert server.answer("version") == first
        assert server.page() is page
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4321, "total": 0.5}\n')
        assert server.answer("version") != first
        assert "4,321" in server.page().decode()


def test_a_port_that_is_taken_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", max_steps=100)
    with served(run) as server:
        assert main("watch", [str(run), "--port", str(server.port)]) == 2
    assert f"--port {server.port}: can't be listened to" in capsys.readouterr().err
