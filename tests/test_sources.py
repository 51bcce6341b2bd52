"""Sources: what folders, globs and lists name, in order, with their labels; a bad row is named, none is dropped."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets.sources import Source, find_sources, read_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b/c.MKV", "b/a.webm", "b/.hidden.mp4", ".cache/x.mp4", "notes.txt", "frames/frame_0/v.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def listed(tmp_path: Path, rows: object, name: str = "list.json") -> list[Source]:
    (tmp_path / name).write_text(json.dumps({"data": rows}))
    return find_sources([tmp_path / name])


def csv_of(tmp_path: Path, text: str | bytes) -> list[Source]:
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_sources([str(tmp_path / "list.csv")])


def test_folder(folder):
    found = find_sources([folder])
    assert [(s.id, s.video) for s in found] == [
        ("a", f"{folder}/a.mp4"),
        ("b/a", f"{folder}/b/a.webm"),
        ("b/c", f"{folder}/b/c.MKV"),
    ]
    assert str(found[0]) == str(folder / "a.mp4")


def test_files_and_globs(folder):
    a, c = str(folder / "a.mp4"), str(folder / "b/c.MKV")
    assert find_sources([c, a]) == [Source("c", video=c), Source("a", video=a)]
    assert [s.video for s in find_sources([f"{folder}/**/*.[mM]*"])] == [a, c]
    odd = folder / "odd[1].mp4"
    odd.write_bytes(b"x")
    assert [s.video for s in find_sources([odd])] == [str(odd)]
    with pytest.raises(MediaError, match="the pattern matches no file"):
        find_sources([f"{folder}/*.avi"])


@pytest.mark.parametrize(
    "places, message",
    [
        (["/no/such"], "/no/such: no such file or folder"),
        ([], "an empty list: names no clip"),
        (["/no/such.json"], "no such file"),
        (["/no/such.csv"], "no such file"),
    ],
)
def test_nothing_there(places, message):
    with pytest.raises(MediaError, match=message):
        find_sources(places)


def test_a_folder_without_media(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(MediaError, match=f"{tmp_path}: no media file found"):
        find_sources([tmp_path])


def test_links_in_a_circle(folder):
    os.symlink(folder, folder / "b" / "again")
    assert len(find_sources([folder])) == 3


@pytest.mark.parametrize("heading", ["", "path,labels\n", "\ufeffvideo_path\n", "\n\npath,labels\n"])
def test_csv(tmp_path, heading):
    found = csv_of(tmp_path, heading + 'a.mp4,"/m/a, /m/b"\n\nsub/b.webm\n/abs/c.mkv,/m/c,ignored\n"d,e.mp4",\n')
    assert [(s.id, s.labels, s.video) for s in found] == [
        ("a", ("/m/a", "/m/b"), f"{tmp_path}/a.mp4"),
        ("sub/b", (), f"{tmp_path}/sub/b.webm"),
        ("/abs/c", ("/m/c",), "/abs/c.mkv"),
        ("d,e", (), f"{tmp_path}/d,e.mp4"),
    ]


@pytest.mark.parametrize("first", ["sub/noend", "clip.m2ts", "present"])
def test_a_first_row_that_is_a_clip_is_kept(tmp_path, first):
    (tmp_path / "present").touch()
    assert [Path(s.video).name for s in csv_of(tmp_path, f"{first}\nb.mp4\n")] == [Path(first).name, "b.mp4"]


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "names no clip"),
        (b"path\n", "names no clip"),
        (b"\xff\xfe\n", "not a readable CSV list"),
        (b'"' + b"x" * 200000 + b'"\n', "not a readable CSV list"),
        (b",,\n  \n", "names no clip"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    with pytest.raises(MediaError, match=rf"list.csv: {message}"):
        csv_of(tmp_path, text)


def test_published_layout(tmp_path):
    (source,) = listed(tmp_path, [{"video_id": "v", "wav": "w/v.flac", "video_path": "frames/", "labels": "/m/a,/m/b"}])
    assert source == Source("v", ("/m/a", "/m/b"), None, f"{tmp_path}/frames", f"{tmp_path}/w/v.flac")
    assert str(source) == f"{tmp_path}/w/v.flac"
    (source,) = listed(tmp_path, [{"video_id": "v", "wav": "/w/v.wav", "video_path": "/frames"}])
    assert (source.frames, source.sound, source.labels) == ("/frames", "/w/v.wav", ())


def test_videos_in_a_published_list(tmp_path):
    rows = [
        {"video_id": "1", "wav": "w.wav", "video_path": "a.MP4", "labels": ""},
        {"video_id": "2", "video_path": "/x/a.mkv"},
        {"video_id": "3", "video": "b.mp4", "labels": " /m/a ,, "},
        {"video_id": "4", "wav": "", "video_path": "", "video": "c"},
        {"video_id": "5", "wav": "w.wav", "video_path": "gone", "video": "d.mp4"},
        {"video_id": "6", "wav": "w.wav", "video_path": "frames", "video": "d.mp4"},
    ]
    (tmp_path / "frames").mkdir()
    found = listed(tmp_path, rows)
    assert [(s.id, s.video and os.path.relpath(s.video, tmp_path)) for s in found[:1] + found[2:]] == [
        ("1", "a.MP4"),
        ("3", "b.mp4"),
        ("4", "c"),
        ("5", "d.mp4"),
        ("6", None),
    ]
    assert found[1].video == "/x/a.mkv" and found[2].labels == ("/m/a",) and found[5].frames == f"{tmp_path}/frames"


@pytest.mark.parametrize(
    "row, message",
    [
        (5, "clip 1 is int; allowed: an object"),
        ([], "clip 1 is list"),
        ({}, "clip 1 has no video_id"),
        ({"video_id": ""}, "has no video_id"),
        ({"video_id": 5}, "clip 1: video_id is 5; allowed: text"),
        ({"video_id": "v"}, r"clip 1 \(v\) names neither wav and video_path nor a video"),
        ({"video_id": "v", "wav": "a.wav"}, "names neither"),
        ({"video_id": "v", "video_path": "frames"}, "names neither"),
        ({"video_id": "v", "video": ["a"]}, r"video is \['a'\]"),
        ({"video_id": "v", "labels": ["/m/a"]}, "labels is"),
        ({"video_id": "v", "wav": None, "video_path": "f"}, "wav is None"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(MediaError, match=rf"list.json: .*{message}"):
        listed(tmp_path, [{"video_id": "a", "video": "a.mp4"}, row])


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "5", '{"data": 5}', '{"data": {}}', "{}", "\0", '{"data": [', "[" * 100000, '{"data": ' + "9" * 5000 + "}"],
)
def test_bad_lists(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(MediaError, match=r'x.json: (not a readable list|"data" is)'):
        find_sources([tmp_path / "x.json"])


def test_an_empty_list(tmp_path):
    with pytest.raises(MediaError, match=r"list.json: names no clip"):
        listed(tmp_path, [])


def test_byte_order_mark(tmp_path):
    (tmp_path / "l.json").write_bytes(b"\xef\xbb\xbf" + b'{"data": [{"video_id": "v", "video": "a.mp4"}]}')
    assert len(find_sources([tmp_path / "l.json"])) == 1


def test_a_long_list_is_small_and_fast(tmp_path):
    rows = [{"video_id": f"v{i}", "wav": f"w/{i}.wav", "video_path": "f", "labels": "/m/a,/m/b"} for i in range(20000)]
    begin = time.perf_counter()
    found = listed(tmp_path, rows)
    assert time.perf_counter() - begin < 5
    assert found[0].frames is found[-1].frames and found[0].labels[0] is found[-1].labels[0]


def test_missing_frames_walk_down(tmp_path):
    source = Source("v", frames=str(tmp_path), sound="s.wav")
    for k in (0, 2):
        (tmp_path / f"frame_{k}").mkdir()
        (tmp_path / f"frame_{k}" / "v.jpg").write_bytes(b"%d" % k)
    assert [source.image(k) for k in range(5)] == [b"0", b"0", b"2", b"2", b"2"]
    with pytest.raises(MediaError, match="w: no frame 3 or earlier in"):
        Source("w", frames=str(tmp_path), sound="s.wav").image(3)


def test_encoded(tmp_path):
    (tmp_path / "frame_0").mkdir()
    (tmp_path / "frame_0" / "v.jpg").write_bytes(b"picture")
    (tmp_path / "v.wav").write_bytes(b"sound")
    source = Source("v", ("/m/a",), frames=str(tmp_path), sound=str(tmp_path / "v.wav"))
    assert source.head() == ("v", ("/m/a",), b"sound") and source.image(4) == b"picture"


def test_what_is_no_file(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    os.symlink("loop", tmp_path / "loop")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("empty", "pipe", "loop", "gone", ".", "x" * 300, "x\0y", "\ud800"):
        with pytest.raises(MediaError):
            read_file(f"{tmp_path}/{name}")
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(MediaError, match="0 bytes; allowed: 1 byte to 1 GiB"):
            read_file(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_too_large_to_read(tmp_path):
    with open(tmp_path / "big", "wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(MediaError, match="1073741825 bytes; allowed: 1 byte to 1 GiB"):
        read_file(str(tmp_path / "big"))
