"""What `--video_path` can name, in which order it comes, and what is said when there is nothing."""

import json
import os
from pathlib import Path

import pytest
from media import BUNDLED

from causalvae.data.decode import probe
from causalvae.data.sources import CLIPS, ClipSource, open_source
from causalvae.errors import ConfigError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def ids(source: ClipSource) -> list[str]:
    return [source[i].id for i in range(len(source))]


def test_a_folder_is_searched_recursively_and_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b/2.mp4", "b/10.AVI", "a.webm", "c/d/e/f.png", "notes.md", "b/.hidden"):
        touch(tmp_path / name)
    source = open_source(str(tmp_path))
    assert ids(source) == ["a.webm", "b/10.AVI", "b/2.mp4", "c/d/e/f.png"]
    assert all(os.path.isabs(source[i].path) and os.path.exists(source[i].path) for i in range(len(source)))


def test_links_to_films_and_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    film = touch(tmp_path / "elsewhere" / "film.mp4")
    inside = tmp_path / "set"
    touch(inside / "a.mp4")
    (inside / "link.mp4").symlink_to(film)
    (inside / "more").symlink_to(film.parent)
    (inside / "again").symlink_to(inside)
    (film.parent / "back").symlink_to(inside)
    assert ids(open_source(str(inside))) == ["a.mp4", "link.mp4", "more/film.mp4"]


def test_the_fingerprint_is_that_of_names_and_sizes_and_not_of_the_place(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        touch(tmp_path / folder / "a.mp4")
        touch(tmp_path / folder / "b.mp4")
    here, there = open_source(str(tmp_path / "here")), open_source(str(tmp_path / "there"))
    assert here.fingerprint == there.fingerprint
    (tmp_path / "there" / "b.mp4").write_bytes(b"longer")
    assert here.fingerprint != open_source(str(tmp_path / "there")).fingerprint
    (tmp_path / "here" / "b.mp4").rename(tmp_path / "here" / "c.mp4")
    assert open_source(str(tmp_path / "here")).fingerprint != there.fingerprint


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "# a remark\nsub/a.mp4\n\nb c.mp4\r\n"),
        ("list.csv", "label,Video\n1,sub/a.mp4\n2,b c.mp4\n"),
        ("plain.csv", "sub/a.mp4,1\nb c.mp4,2\n"),
        ("list.jsonl", '{"path": "sub/a.mp4"}\n\n{"video": "b c.mp4", "label": 2}\n'),
        ("plain.jsonl", '"sub/a.mp4"\n"b c.mp4"\n'),
    ],
)
def test_a_list_names_films_relative_to_its_folder(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, newline="")
    source = open_source(str(tmp_path / name))
    assert ids(source) == ["sub/a.mp4", "b c.mp4"]
    assert source[0].path == str(tmp_path / "sub" / "a.mp4")


def test_a_list_keeps_its_order_and_takes_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("z.mp4\n/a/b.mp4\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert [source[i].path for i in range(2)] == [str(tmp_path / "z.mp4"), "/a/b.mp4"]


def test_names_that_are_no_text_survive_folders_lists_and_json(tmp_path: Path) -> None:
    name = b"caf\xe9 \xff.mp4"
    touch(tmp_path / os.fsdecode(name))
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    from_folder, from_list = open_source(str(tmp_path)), open_source(str(tmp_path / "list.txt"))
    assert (
        os.fsencode(from_folder[0].path)
        == os.fsencode(from_list[0].path)
        == os.fsencode(tmp_path) + b"/" + name
    )
    assert json.loads(json.dumps(from_folder[0].id)) == from_folder[0].id
    assert from_folder.fingerprint == from_list.fingerprint
    assert len(open_source(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))) == 1


def test_a_single_film_is_a_source_of_one() -> None:
    assert ids(open_source(str(BUNDLED / "bunny.webm"))) == ["bunny.webm"]


def test_the_sample_clips_are_there_and_the_held_back_one_is_not_trained_on() -> None:
    train, held_out = open_source("sample:"), open_source("sample:heldout")
    assert set(ids(train)).isdisjoint(ids(held_out))
    for source in (train, held_out):
        for i in range(len(source)):
            assert probe(source[i].path).frames > 64
            assert source[i].id in (CLIPS / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing/here", ["no such file or folder", "sample:"]),
        ("datasets/UCF101/train", ["crcv.ucf.edu", "unrar x", "`--video_path sample:` works"]),
        ("shards-{000..999}.tar", ["there is no file", "shards-000.tar"]),
        ("a\0b", ["a\\x00b: there is no such file"]),
        ("x" * 5000, ["not a path"]),
    ],
)
def test_a_path_to_nothing_says_what_to_do(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_source(name)
    assert all(word in str(caught.value) for word in words)


def test_unknown_samples_and_empty_sources_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are sample: and sample:heldout"):
        open_source("sample:dogs")
    with pytest.raises(ConfigError, match=r"files ending in \.3gp .*\.webm.*sample:"):
        open_source(str(tmp_path))
    for name in ("list.txt", "list.csv", "list.jsonl"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(ConfigError, match="names no video"):
            open_source(str(tmp_path / name))


@pytest.mark.parametrize("line", ["{", "7", '{"name": "a.mp4"}'])
def test_a_line_of_a_list_that_names_nothing_is_pointed_at(line: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(f'"a.mp4"\n{line}\n')
    with pytest.raises(ConfigError, match="line 2"):
        open_source(str(tmp_path / "list.jsonl"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", 'Video,label,Text\na.mp4,1,"a cat, asleep"\nb.mp4,2,ein H\u00e4schen\n'),
        (
            "list.jsonl",
            '{"path": "a.mp4", "text": "a cat, asleep"}\n{"path": "b.mp4", "text": "ein H\u00e4schen"}\n',
        ),
    ],
)
def test_a_list_gives_captions_by_the_name_of_their_column(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    source = open_source(str(tmp_path / name), caption_column="text")
    assert [source[i].caption for i in range(2)] == ["a cat, asleep", "ein H\u00e4schen"]
    assert ids(source) == ["a.mp4", "b.mp4"]
    assert open_source(str(tmp_path / name))[0].caption is None


def test_a_caption_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("video,words\na.mp4,x\n")
    with pytest.raises(ConfigError, match="its columns are video, words"):
        open_source(str(path), caption_column="text")
    path.write_text("a.mp4,x\n")
    with pytest.raises(ConfigError, match="no heading"):
        open_source(str(path), caption_column="text")
    path = tmp_path / "list.jsonl"
    path.write_text('{"video": "a.mp4", "text": 3}\n')
    with pytest.raises(ConfigError, match="line 1: text is no text"):
        open_source(str(path), caption_column="text")


@pytest.mark.parametrize(
    ("videos", "lists"), [("UCF-101", "ucfTrainTestlist"), (".", "."), ("ucf/UCF-101", "ucf")]
)
@pytest.mark.parametrize("end", [" 1\r\n", "\n"])
def test_the_split_files_of_ucf101_are_lists_of_its_videos(
    videos: str, lists: str, end: str, tmp_path: Path
) -> None:
    names = ["YoYo/v_YoYo_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"]
    films = [touch(tmp_path / videos / name) for name in names]
    file = touch(tmp_path / lists / "trainlist01.txt")
    file.write_text("".join(name + end for name in names))
    source = open_source(str(file))
    assert ids(source) == names
    assert [Path(source[i].path).resolve() for i in range(2)] == [film.resolve() for film in films]


def test_a_list_that_is_no_split_of_ucf101_keeps_its_lines_as_they_are(tmp_path: Path) -> None:
    lines = ["YoYo/v_YoYo_g08_c01.avi 1", "my film 1"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert ids(open_source(str(tmp_path / "list.txt"))) == lines
