"""`cavmae-fast check`: every defect found and named, statistics and weights as the published scripts compute them."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cavmae_fast.data.commands import check as check_module
from cavmae_fast.data.commands import findings, log_mel
from cavmae_fast.data.commands.census import Census
from cavmae_fast.data.commands.check import CheckConfig, check
from cavmae_fast.data.commands.inspecting import InspectClip
from cavmae_fast.data.commands.prepare import PrepareConfig, prepare
from cavmae_fast.data.commands.rendering import render
from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets.labels import LabelError
from cavmae_fast.data.sets.shards import shard_name
from cavmae_fast.reference.fbank import log_mel_fbank

MEDIA = Path(__file__).resolve().parents[1].parent / "shared" / "media"
MIDS = ("/m/a", "/m/b", "/m/c")
RATE = 16000


def noise(seconds, seed=0, loud=0.2):
    return (np.random.default_rng(seed).normal(0, loud, round(seconds * RATE)).clip(-1, 1) * 32767).astype(np.int16)


class Folder:
    """A data set in the published layout."""

    def __init__(self, root):
        self.root, self.rows = root, []
        self.csv = root / "classes.csv"
        self.csv.write_text("index,mid,display_name\n" + "".join(f'{i},{m},"Name, {m}"\n' for i, m in enumerate(MIDS)))
        self.list = root / "train.json"

    def add(self, name, labels="/m/a", sound=None, level=None, frames=range(10), format="FLAC"):
        """A clip with a picture of noise, or of one gray level or color."""
        import soundfile
        from PIL import Image

        seed = len(self.rows)
        for k in frames:
            path = self.root / f"frames/frame_{k}/{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (224, 224, 3)
            if level is None:
                image = np.random.default_rng([seed, k]).integers(0, 256, (28, 28, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            else:
                image = np.broadcast_to(np.uint8(level), shape)
            Image.fromarray(np.ascontiguousarray(image)).save(path)
        wav = self.root / f"sound/{name}.{format.lower()}"
        wav.parent.mkdir(exist_ok=True)
        soundfile.write(wav, noise(1.5, seed) if sound is None else sound, RATE, format=format, subtype="PCM_16")
        self.rows.append({"video_id": name, "wav": f"sound/{wav.name}", "video_path": "frames", "labels": labels})
        self.list.write_text(json.dumps({"data": self.rows}))
        return wav

    def config(self, **options):
        return CheckConfig((str(self.list),), labels=self.csv, workers=2, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def found(report, kind):
    return [entry.get("id") or Path(entry["source"]).name for entry in report["findings"].get(kind, [])]


def reasons(report, kind):
    return " | ".join(entry["reason"] for entry in report["findings"][kind])


def test_clean_list(folder):
    for i in range(3):
        folder.add(f"c{i}", labels=",".join(MIDS[: i + 1]), format=("FLAC", "WAV")[i % 2])
    report = check(folder.config())
    assert report["ok"] and report["clips"] == report["usable"] == 3 and report["counts"] == {}
    assert report["hours"] == pytest.approx(4.5 / 3600)
    out = folder.root / "train_check"
    on_disk = json.loads((out / "check.json").read_text())
    assert on_disk == json.loads(json.dumps(report))
    assert sorted(path.name for path in out.iterdir()) == ["check.json", "rejects.jsonl"]
    assert (out / "rejects.jsonl").read_text() == ""
    assert [row["clips"] for row in report["classes"]["counts"]] == [3, 2, 1]
    assert render(report).startswith("ok: 3 of 3 clips can be used")


def test_every_defect_of_a_list_is_named(folder):
    folder.add("good")
    folder.add("no_sound_file").unlink()
    folder.add("no_frames", frames=())
    folder.add("no_first_frame", frames=range(1, 10))
    flac = folder.add("cut_sound")
    flac.write_bytes(flac.read_bytes()[:9000])
    folder.add("no_sound", sound=noise(1)[:0])
    folder.add("bad_frame")
    picture = folder.root / "frames/frame_7/bad_frame.jpg"
    picture.write_bytes(picture.read_bytes()[:2000])
    folder.add("zeros", sound=np.zeros(2 * RATE, np.int16))
    folder.add("hum", sound=np.full(2 * RATE, 1234, np.int16) + (np.arange(2 * RATE) % 2).astype(np.int16))
    folder.add("one_step", sound=np.tile(np.array([-1, 1], np.int16), RATE))
    folder.add("two_steps", sound=np.tile(np.array([-2, 2], np.int16), RATE))
    folder.add("black", level=(0, 1, 0))
    folder.add("red", level=(200, 10, 10))
    folder.add("short", sound=noise(0.5))
    folder.add("seven", frames=(0, 1, 2, 4, 5, 6, 8))
    folder.add("twice", labels="/m/b")
    folder.rows.append({**folder.rows[0], "video_id": "twice", "video_path": "frames"})
    folder.add("strange", labels="/m/a,/m/x")
    folder.add("plain", labels=" ")
    report = check(folder.config())
    assert not report["ok"]
    assert found(report, "missing") == ["no_sound_file", "no_frames", "no_first_frame"]
    assert found(report, "unreadable") == ["cut_sound", "no_sound", "bad_frame"]
    assert "frame_7/bad_frame.jpg" in reasons(report, "unreadable") and "cut_sound.flac" in reasons(report, "unreadable")
    assert found(report, "silent") == ["zeros", "hum", "one_step"]
    assert found(report, "black") == ["black"] and found(report, "constant") == ["red"]
    assert found(report, "short") == ["short"] and "0.500 s" in reasons(report, "short")
    assert found(report, "frames") == ["seven"] and "frame_3, frame_7, frame_9" in reasons(report, "frames")
    assert found(report, "duplicate") == ["twice"] and "also that of clip 15" in reasons(report, "duplicate")
    assert found(report, "label") == ["strange"] and report["classes"]["unknown"] == {"/m/x": 1}
    assert found(report, "unlabelled") == ["plain"]
    assert set(report["counts"]) == set(findings.ERRORS) - {"shard"} | set(findings.WARNINGS)
    assert report["usable"] == report["clips"] - 7 == report["statistics"]["clips"]
    assert not report["weights"]["written"] and not (folder.root / "train_weight.csv").exists()
    lines = [json.loads(line) for line in (folder.root / "train_check/rejects.jsonl").open()]
    assert len(lines) == sum(report["counts"].values())
    assert {"kind", "clip", "id", "source", "reason"} == set(lines[0])
    text = render(report)
    assert text.startswith("NOT OK") and "/m/x" in text and "no_frames" in text and "-90 dBFS" in text


def test_warnings_alone_are_ok_and_thresholds_count(folder):
    folder.add("quiet", sound=np.tile(np.array([-10, 10], np.int16), RATE))
    folder.add("dark", level=(20, 20, 20))
    assert check(folder.config())["counts"] == {"constant": 1}
    report = check(folder.config(silence_db=-60, black_level=30, min_seconds=1.8))
    assert report["ok"] and report["counts"] == {"silent": 1, "black": 1, "short": 1}
    assert "no sound above -60 dBFS" in render(report)


def published_statistics(waveforms, length, batch):
    """get_norm_stats.py, in float64, without augmentation."""
    spectrograms = []
    for waveform in waveforms:
        wave = torch.from_numpy(waveform.astype(np.float64))[None] / 32768
        fbank = log_mel_fbank(wave - wave.mean())[0]
        spectrograms.append(torch.nn.functional.pad(fbank, (0, 0, 0, max(0, length - len(fbank))))[:length])
    batches = [torch.stack(spectrograms[i : i + batch]) for i in range(0, len(spectrograms), batch)]
    return np.mean([b.mean() for b in batches]), np.mean([b.std() for b in batches])


def test_statistics(folder, monkeypatch):
    monkeypatch.setattr(log_mel, "_PUBLISHED_BATCH", 4)
    monkeypatch.setattr(log_mel, "_FEATURE_BATCH", 3)
    waveforms = [noise(0.3 + 0.25 * i, seed=i, loud=0.3 / (i + 1)) for i in range(9)]  # 30 to 228 frames
    for i, waveform in enumerate(waveforms):
        folder.add(f"c{i}", sound=waveform)
    statistics = check(folder.config(seconds=2.0, min_seconds=0))["statistics"]
    mean, std = published_statistics(waveforms, 200, 4)
    # Allowed: five units in the last place of a float32 feature near its floor of -16. The mean of thousands is nearer.
    near = 5 * 8 * torch.finfo(torch.float32).eps
    assert statistics["published"]["mean"] == pytest.approx(mean, abs=near)
    assert statistics["published"]["std"] == pytest.approx(std, abs=near)
    own = torch.cat([log_mel_fbank(torch.from_numpy(w / 32768.0)[None])[0][:200] for w in waveforms])
    assert statistics["frames"] == len(own) and statistics["clips"] == 9
    assert statistics["mean"] == pytest.approx(own.mean().item(), abs=near)
    assert statistics["std"] == pytest.approx(own.std().item(), abs=near)


def test_weights_are_the_published_ones(folder):
    labels = ["/m/a,/m/b", "/m/a", "/m/b", "/m/a", ""]
    for i, ids in enumerate(labels):
        folder.add(f"c{i}", labels=ids)
    (folder.root / "sound/c2.flac").unlink()  # its row stays
    path = folder.root / "train_weight.csv"
    report = check(folder.config())
    assert not report["ok"] and report["weights"] == {"path": str(path), "written": True, "reason": None}
    a, b = 1000 / (3 + 0.01), 1000 / (2 + 0.01)
    np.testing.assert_allclose(np.loadtxt(path, delimiter=","), [a + b, a, b, a, 0], rtol=1e-12)
    assert [row["mid"] for row in report["classes"]["empty"]] == ["/m/c"] and "no clip: 2, /m/c, Name" in render(report)
    # Another's weights are not overwritten, unless the file was named; the same numbers may be.
    assert check(folder.config())["weights"]["written"]
    path.write_text("1\n1\n1\n1\n1\n")
    report = check(folder.config())
    assert not report["weights"]["written"] and "other weights" in render(report) and path.read_text().startswith("1\n")
    check(folder.config(weights=path))
    assert np.loadtxt(path)[0] == pytest.approx(a + b)


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("list"))
    for i in range(7):
        folder.add(f"c{i}", labels=MIDS[i % 2])
    folder.add("silent", sound=np.zeros(2 * RATE, np.int16))
    out = folder.root / "shards"
    prepare(PrepareConfig((str(folder.list),), out, labels=folder.csv, shard_clips=3, workers=2))
    return folder, out


@pytest.fixture
def shards(prepared, tmp_path):
    return Path(shutil.copytree(prepared[1], tmp_path / "shards"))


def check_shards(shards, **options):
    return check(CheckConfig((str(shards),), workers=2, **options))


def test_shards(prepared, shards):
    rejects = (shards / "rejects.jsonl").read_bytes()
    report = check_shards(shards)
    assert report["ok"] and report["counts"] == {"silent": 1} and found(report, "silent") == ["silent"]
    assert (shards / "rejects.jsonl").read_bytes() == rejects and (shards / "check/check.json").is_file()
    assert [row["clips"] for row in report["classes"]["counts"]] == [5, 3, 0]
    assert len(np.loadtxt(shards / "weights.csv")) == 8
    from_list = check(prepared[0].config(out=shards / "other"))
    for key in ("statistics", "classes", "counts"):
        assert report[key] == from_list[key]
    other = shards / "classes.csv"
    other.write_text("index,mid,display_name\n0,/m/a,A\n")
    report = check_shards(shards, labels=other)
    assert report["counts"]["label"] == 3 and not report["ok"]


def rewrite(path, change):
    """Writes the tar file again, its members `(name, data)` given through `change`; the size stays, as zeros at the end."""
    size = path.stat().st_size
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    os.truncate(path, size)


def renamed(name, number=5):
    return lambda members: [(name if i == number else old, data) for i, (old, data) in enumerate(members)]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "000000001.0.jpg"])
def test_foreign_names_in_a_tar(shards, tmp_path, name):
    rewrite(shards / f"{shard_name(0)}.tar", renamed(name))
    report = check_shards(shards)
    assert not report["ok"] and found(report, "shard") == ["c0"] and repr(name) in reasons(report, "shard")
    assert report["usable"] == 7 and not list(tmp_path.rglob("*evil*"))


def test_a_link_in_a_tar(shards):
    path = shards / f"{shard_name(0)}.tar"
    with tarfile.open(path) as tar:
        last = next(member for member in tar if member.name == "000000000.9.jpg")
    last.type, last.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with path.open("r+b") as file:
        file.seek(last.offset)
        file.write(last.tobuf(tarfile.USTAR_FORMAT))
    report = check_shards(shards)
    assert found(report, "shard") == ["c0"] and "no regular file" in reasons(report, "shard")


def test_missing_and_extra_members(shards):
    rewrite(shards / f"{shard_name(0)}.tar", lambda members: members[:-1])
    with (shards / f"{shard_name(1)}.tar").open("r+b") as file:  # into the zeros that end the archive
        end = sum(512 + -(-size // 512) * 512 for clip in record(shards, 1)["clips"] for size in clip["size"])
        file.seek(end)
        file.write(tarfile.TarInfo("../evil").tobuf(tarfile.USTAR_FORMAT))
    report = check_shards(shards)
    assert report["counts"]["shard"] == 2 and report["usable"] == 7
    assert found(report, "shard") == ["c2", f"{shard_name(1)}.tar"]
    assert "no readable header; the index says '000000002.9.jpg'" in reasons(report, "shard")
    assert "belong to no clip of the index; they hold '../evil'" in reasons(report, "shard")


def record(shards, number):
    return json.loads((shards / f"{shard_name(number)}.json").read_text())


def test_members_between_clips(shards):
    """An index that leaves out a clip in the middle: the tar file holds what no one reads."""
    index = np.load(shards / "index.npy")
    np.save(shards / "index.npy", np.delete(index, 1))
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**manifest, "clips": 7}))
    report = check_shards(shards)
    assert "lists 2 clips of it; manifest.json says 3" in reasons(report, "shard")
    assert "belong to no clip of the index; they hold '000000001.json'" in reasons(report, "shard")


def test_swapped_bytes_and_truncated_and_missing_shards(shards):
    clips = record(shards, 0)["clips"]
    with (shards / f"{shard_name(0)}.tar").open("r+b") as file:
        place = clips[1]["offset"] + 512 + -(-clips[1]["size"][0] // 512) * 512 + 512 + 300  # in the sound
        file.seek(place)
        swapped = file.read(2)[::-1]
        file.seek(place)
        file.write(swapped)
    os.truncate(shards / f"{shard_name(1)}.tar", record(shards, 1)["clips"][2]["offset"] + 700)
    (shards / f"{shard_name(2)}.tar").unlink()
    report = check_shards(shards)
    assert found(report, "unreadable") == ["c1", "c5"] and found(report, "missing") == ["c6", "silent"]
    assert "000000001.flac is damaged" in reasons(report, "unreadable")
    assert "shard-000001.tar: has " in reasons(report, "shard")
    assert "shard-000002.tar: is missing" in reasons(report, "shard")
    assert report["usable"] == 4
    assert len(np.loadtxt(shards / "weights.csv")) == 8  # labels from the shards' records
    (shards / f"{shard_name(2)}.json").unlink()  # then nothing says what the lost clips were
    assert found(check_shards(shards), "missing") == ["000000006", "000000007"]


def test_an_index_that_asks_for_too_much(shards):
    index = np.load(shards / "index.npy")
    index["size"][0, 1] = 2**32 - 1
    index["offset"][4] = 2**63
    np.save(shards / "index.npy", index)
    report = check_shards(shards)
    assert found(report, "unreadable") == ["c0", "c4"] and "but the file has" in reasons(report, "unreadable")
    assert "they hold '000000004.json'" in reasons(report, "shard")


def test_no_readable_set_of_shards(shards):
    (shards / "index.npy").write_bytes(b"no index")
    with pytest.raises(MediaError, match=r"index\.npy: not a readable index"):
        check_shards(shards)
    with pytest.raises(MediaError, match="one such folder, and nothing beside it"):
        check(CheckConfig((str(shards), str(shards))))


# ------------------------------------------------------------------------------------------------------------- workers


class Accident(InspectClip):
    """Inspects, but for clips whose name says otherwise."""

    def _look(self, name, images, waveform):
        if "crash" in name:
            os._exit(3)
        if "hang" in name:
            time.sleep(60)
        if "hunger" in name:
            bytearray(8 << 30)
        return super()._look(name, images, waveform)


def test_accidents_cost_one_clip(folder, monkeypatch):
    names = ["a", "crash", "b", "hang", "c", "hunger"]
    for name in names:
        folder.add(name)
    monkeypatch.setattr(check_module, "InspectClip", Accident)
    report = check(folder.config(timeout=2))
    assert found(report, "unreadable") == ["crash", "hang", "hunger"] and report["usable"] == 3
    assert "died (exit status 3)" in reasons(report, "unreadable") and "longer than 2 s" in reasons(report, "unreadable")
    assert "2048 MiB of memory" in reasons(report, "unreadable")
    assert [row["clips"] for row in report["classes"]["counts"]] == [6, 0, 0]


def test_workers_import_no_torch():
    code = "import sys, cavmae_fast.data.commands.inspecting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -------------------------------------------------------------------------------------------------------- what is given


def test_videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = check(CheckConfig((str(MEDIA),), workers=2))
    assert report["ok"] and report["clips"] == 2 and report["counts"] == {}
    assert (tmp_path / "check/check.json").is_file() and report["classes"] is None
    assert "the classes are not known" in render(report)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((MEDIA / "nasa_13013.mp4").read_bytes()[:5000])
    (tmp_path / "list.csv").write_text(f"{cut},/m/a\nnowhere.mp4,/m/a\n")
    report = check(CheckConfig((str(tmp_path / "list.csv"),)))
    assert report["counts"] == {"unreadable": 1, "missing": 1} and report["statistics"] is None
    assert "0 of 2" in render(report) and (tmp_path / "list_check/check.json").is_file()


def test_names_cannot_steer_the_terminal(folder):
    folder.add("a")
    row = {"video_id": "\x1b[2J\udc80\n", "wav": "no\x07where.flac", "video_path": "frames", "labels": "/m/\x1b"}
    folder.rows.append(row)
    folder.list.write_text(json.dumps({"data": folder.rows}))
    text = render(check(folder.config()))
    assert all(line.isprintable() for line in text.split("\n")) and "\\x07" in text
    text.encode()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"workers": 0}, "--workers is 0"),
        ({"seconds": 0.0}, "--seconds is 0.0"),
        ({"silence_db": 3.0}, "--silence-db is"),
        ({"out": Path("/proc/none")}, "--out: /proc/none"),
        ({"weights": Path("/proc/none/w.csv")}, "--weights: /proc/none"),
    ],
)
def test_wrong_options(folder, options, message):
    folder.add("a")
    with pytest.raises(ValueError, match=message):
        check(replace(folder.config(), **options))


def test_wrong_files(folder, tmp_path):
    with pytest.raises(MediaError, match=r"nowhere.*no such file"):
        check(CheckConfig((str(tmp_path / "nowhere"),)))
    folder.add("a")
    with pytest.raises(LabelError, match="nowhere"):
        check(replace(folder.config(), labels=tmp_path / "nowhere.csv"))


def test_nothing_is_left_of_a_check_that_failed(folder, monkeypatch):
    folder.add("a")

    def broken(*_):
        raise OSError("broken")

    monkeypatch.setattr(Census, "take", broken)
    with pytest.raises(OSError, match="broken"):
        check(folder.config())
    assert list((folder.root / "train_check").iterdir()) == []


def test_lists_in_the_report_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(findings, "_LISTED", 2)
    for i in range(5):
        folder.add(f"c{i}", labels="")
    report = check(folder.config())
    assert report["counts"]["unlabelled"] == 5 and found(report, "unlabelled") == ["c0", "c1"]
    assert len((folder.root / "train_check/rejects.jsonl").read_text().splitlines()) == 5
    assert report["weights"]["reason"] == "no clip has a label"
