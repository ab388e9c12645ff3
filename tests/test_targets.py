"""Where results go: below the folder, each its own, with the names of their videos."""

from pathlib import Path

import pytest

from causalvae.data.sources import open_source
from causalvae.errors import ConfigError
from causalvae.targets import Target, plan_targets


def planned(*inputs: Path, out: Path, ending: str = ".mp4", side: bool = False) -> list[Target]:
    return plan_targets([str(path) for path in inputs], out, ending=ending, side_by_side=side)


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def names(targets: list[Target], out: Path) -> list[str]:
    return [str(target.file.relative_to(out)) for target in targets]


def test_names_below_a_folder_are_kept_with_new_endings(tmp_path: Path) -> None:
    folder, out = made(tmp_path / "in", "a.avi", "b/c.mkv", "b/d.jpg"), tmp_path / "out"
    found = planned(folder, out=out, side=True)
    assert names(found, out) == ["a.mp4", "b/c.mp4", "b/d.png"]
    assert [target.is_picture for target in found] == [False, False, True]
    assert found[1].side == out / "b/c.side-by-side.mp4"
    assert found[1].record == out / "b/c.mp4.json"


def test_names_that_would_collide_keep_their_old_endings(tmp_path: Path) -> None:
    folder, out = (
        made(tmp_path / "in", "a.avi", "a.mkv", "a.mp4", "B.avi", "b.mkv", "a.png"),
        tmp_path / "out",
    )
    found = names(planned(folder, out=out), out)
    assert found == ["B.avi.mp4", "a.avi.mp4", "a.mkv.mp4", "a.mp4", "a.png", "b.mkv.mp4"]


def test_no_two_results_share_a_file_whatever_their_names_are(tmp_path: Path) -> None:
    clashing = ("a.avi", "a.mkv", "a.avi.mp4", "a.MP4", "a.mp4", "a.side-by-side.mp4", "A.avi", "a-2.mp4")
    folder, out = made(tmp_path / "in", *clashing), tmp_path / "out"
    found = planned(folder, out=out, side=True)
    files = [str(path).casefold() for t in found for path in (t.file, t.side, t.record)]
    assert len(set(files)) == 3 * len(clashing)


def test_several_folders_go_below_their_own_names_and_a_video_is_made_once(tmp_path: Path) -> None:
    one, two, out = made(tmp_path / "x", "a.avi"), made(tmp_path / "y", "a.avi"), tmp_path / "out"
    assert names(planned(one, two, one / "a.avi", out=out), out) == ["x/a.mp4", "y/a.mp4"]


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    made(tmp_path, "a.avi", "in/b.avi")
    listed = tmp_path / "in" / "list.txt"
    listed.write_text(f"../a.avi\n{tmp_path}/in/b.avi\n./b.avi\n")
    out = tmp_path / "out"
    found = names(planned(listed, out=out), out)
    assert found[0] == "a.mp4"
    assert found[1] == str(tmp_path / "in" / "b.mp4")[1:]
    assert all(target.file.resolve().is_relative_to(out) for target in planned(listed, out=out))


def test_long_and_strange_names_stay_apart_and_fit(tmp_path: Path) -> None:
    strange = [
        "x" * 240 + "1.avi",
        "x" * 240 + "2.avi",
        "new\nline.avi",
        "%03d.avi",
        "http:a.avi",
        "-rf.avi",
        "é.avi",
    ]
    folder, out = made(tmp_path / "in", *strange), tmp_path / "out"
    found = planned(folder, out=out, side=True)
    assert len(set(names(found, out))) == len(strange)
    assert all(len(target.record.name.encode()) < 240 for target in found)


def test_results_inside_the_folder_of_the_videos_are_not_taken_for_videos(tmp_path: Path) -> None:
    folder = made(tmp_path / "in", "a.avi", "out/a.mp4")
    assert names(planned(folder, out=folder / "out"), folder / "out") == ["a.mp4"]
    assert names(planned(folder / "out" / "a.mp4", out=tmp_path), tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_no_result_takes_the_place_of_a_video(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "in", name)
    with pytest.raises(ConfigError, match="would take the place of a video"):
        planned(folder, out=folder)


def test_an_error_about_an_input_names_no_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path / "none", out=tmp_path)
    assert "--video_path" not in str(caught.value)
    with pytest.raises(ConfigError, match="--video_path"):
        open_source(str(tmp_path / "none"))
