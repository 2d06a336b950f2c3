"""The index of a shard: equal to the results of `tarfile` and Pillow, with a defined outcome for
every kind of damage.
"""

import json
import os
import signal
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from launch.cli.main import dispatch
from pipeline.data import index as index_module
from pipeline.data.index import (
    FILES,
    Index,
    build_indexes,
    index_path,
    read_index,
    sidecar_path,
    write_index,
)
from pipeline.data.source import Sources
from pipeline.errors import JobError, UserError
from tests.helpers.image_files import html, png_bomb
from tests.helpers.jobs import WAIT, leaving_nothing, until
from tests.helpers.tars import (
    BLOCK,
    Members,
    flipped,
    headers,
    jpeg,
    link,
    sample,
    tar,
    with_header,
)


def write_and_index(path: Path, data: bytes | Members) -> Index:
    path.write_bytes(data if isinstance(data, bytes) else tar(data))
    target = index_path(str(path), None)
    write_index(Sources(), str(path), target)
    index = read_index(target, str(path))
    assert index
    return index


def keys(index: Index) -> list[str]:
    return [texts["key"] for texts in index.texts(np.arange(index.num_samples))]


def test_the_index_equals_the_result_of_tarfile(shards_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    index = write_and_index(path, (shards_folder / "00000.tar").read_bytes())
    data = path.read_bytes()
    offset, size, crc32 = (index.column(name) for name in ("offset", "size", "crc32"))
    file_types = {"image": "jpg", "txt": "txt", "json": "json"}
    with tarfile.open(path) as archive:
        for row, texts in enumerate(index.texts(np.arange(12))):
            for column, kind in enumerate(file_types[name] for name in FILES):
                file = archive.extractfile(f"{texts['key']}.{kind}")
                assert file
                content = file.read()
                assert data[offset[row, column] :][: size[row, column]] == content
                assert crc32[row, column] == zlib.crc32(content)
                if kind != "jpg":
                    assert texts[kind].encode() == content
            assert texts["files"].split() == ["jpg", "json", "txt"]
            assert index.column("caption_length")[row] == len(texts["txt"])
    assert (index.num_samples, index.faults) == (12, ())
    assert (index.column("pixels") == 96).all()
    assert [texts["key"] for texts in index.texts(np.array([3, 7]))] == [
        keys(index)[3],
        keys(index)[7],
    ]
    assert list(index.texts(np.arange(0))) == []


def test_files_that_are_no_part_of_a_sample_and_unusual_names(tmp_path: Path) -> None:
    members = [
        ("x/1.JPEG", jpeg(5, 4)),
        ("x/._1.jpg", b"hidden"),
        ("x/2.webp", jpeg()),  # a JPEG: the content decides
        ("x/1.txt", "  zwölf Äpfel \n".encode()),
        ("x/2.seg.png", b"not the image"),
        ("README", b""),
        ("y.tar/1.jpg", jpeg()),
        ("k" * 300 + ".jpg", jpeg()),  # needs a second header in front
    ]
    index = write_and_index(tmp_path / "0.tar", members)
    assert keys(index) == ["x/1", "x/2", "y.tar/1", "k" * 300]
    assert index.faults == ()
    first, second, *_ = index.texts(np.arange(4))
    assert (first["txt"], first["json"], second["files"]) == ("zwölf Äpfel", "", "webp seg.png")
    assert index.column("size")[1].tolist() == [len(jpeg()), -1, -1]
    assert index.column("pixels")[0].tolist() == [5, 4]
    assert index.column("caption_length").tolist() == [11, 0, 0, 0]


def test_files_of_a_sample_need_not_be_adjacent(tmp_path: Path) -> None:
    a, b = sample("a", json=b"{}"), sample("b", json=b"{}")
    index = write_and_index(tmp_path / "0.tar", [a[0], b[0], b[1], a[1], b[2], a[2]])
    assert keys(index) == ["a", "b"]
    assert [texts["txt"] for texts in index.texts(np.arange(2))] == ["caption of a", "caption of b"]


REFUSED = {
    "html": ([("b.jpg", html()), ("b.txt", b"b")], "its jpg is none of JPEG, PNG, WEBP, GIF, BMP"),
    "empty": ([("b.jpg", b""), ("b.txt", b"b")], "its jpg is none of JPEG, PNG, WEBP, GIF, BMP"),
    "bomb": ([("b.png", png_bomb()), ("b.txt", b"b")], "its png 30000 x 30000 pixels"),
    "no image": (
        [("b.txt", b"b"), ("b.json", b"{}")],
        "no image (jpg, jpeg, png, webp) among its txt, json",
    ),
    "dotted key": (
        [("b.1.jpg", jpeg()), ("b.1.txt", b"b")],
        "among its 1.jpg, 1.txt; a key ends at the first dot",
    ),
    "twice": ([*sample("b"), ("b.txt", b"again")], "has txt twice"),
    "json": (sample("b", json=b"[1]"), "its json is no JSON object"),
    "broken json": (sample("b", json=b'{"a": '), "its json is no JSON object"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_unusable_sample_is_left_out_with_its_reason(kind: str, tmp_path: Path) -> None:
    members, reason = REFUSED[kind]
    index = write_and_index(tmp_path / "0.tar", [*sample("a"), *members, *sample("c")])
    assert keys(index) == ["a", "c"]
    (fault,) = index.faults
    assert (fault.key, fault.size) == ("b", 0)
    assert reason in fault.reason


def test_samples_without_a_caption_are_indexed(tmp_path: Path) -> None:
    members = [
        ("a.jpg", jpeg()),
        ("b.jpg", jpeg()),
        ("b.txt", b" \n"),
        ("c.jpg", jpeg()),
        ("c.txt", b"\xff\xfe\x00"),
    ]
    index = write_and_index(tmp_path / "0.tar", members)
    assert index.column("caption_length").tolist() == [0, 0, 0]
    assert index.faults == ()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    index = write_and_index(
        tmp_path / "0.tar", tar([*sample("a"), ("b.txt", b"b")], link("b.jpg", kind))
    )
    assert keys(index) == ["a"]
    assert [tuple(fault) for fault in index.faults] == [
        ("b", "its jpg is a link or a device, not a file", 0)
    ]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_names_that_lead_out_of_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    index = write_and_index(tmp_path / "0.tar", [*sample("a"), *sample(name)])
    assert keys(index) == ["a"]
    assert [tuple(fault) for fault in index.faults] == [
        (name, "its name leads out of the archive", 0)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.index.safetensors", "0.tar"]


def test_files_that_are_too_large_are_refused(tmp_path: Path) -> None:
    index = write_and_index(tmp_path / "0.tar", sample("a", txt=bytes(2**24 + 1)))
    assert [fault.reason for fault in index.faults] == [
        "its txt has 16,777,217 bytes; the limit is 16,777,216"
    ]


THREE = tar([*sample("a", 1), *sample("b", 2), *sample("c", 3)])
OFFSETS = headers(THREE)
DAMAGED = {  # the bytes, the remaining samples, the start of the reason
    "cut in data": (THREE[: OFFSETS[4] + 600], ["a", "b"], "cut short at byte"),
    "cut at a header": (THREE[: OFFSETS[4]], ["a", "b"], "cut short at byte"),
    "cut in a header": (THREE[: OFFSETS[4] + 100], ["a", "b"], "damaged from byte"),
    "flipped header": (
        flipped(THREE, OFFSETS[2] + 5),
        ["a", "c"],
        f"damaged from byte {OFFSETS[2]:,} to {OFFSETS[3]:,}",
    ),
    "first header": (flipped(THREE, 5), ["b", "c"], "damaged from byte 0 to"),
    "a hole": (
        THREE[: OFFSETS[2]] + os.urandom(BLOCK) + THREE[OFFSETS[4] :],
        ["a", "c"],
        "damaged from byte",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_readable_samples_of_a_damaged_tar_are_indexed(kind: str, tmp_path: Path) -> None:
    """`tarfile` alone, and WebDataset's readers, silently lose all samples after the damage."""
    data, remaining, reason = DAMAGED[kind]
    index = write_and_index(tmp_path / "0.tar", data)
    assert keys(index) == remaining
    (range_fault,) = [fault for fault in index.faults if not fault.key]
    assert range_fault.reason.startswith(reason)
    path = tmp_path / "0.tar"
    for row in range(index.num_samples):
        offset = int(index.column("offset")[row, 0])
        size = int(index.column("size")[row, 0])
        crc32 = int(index.column("crc32")[row, 0])
        assert zlib.crc32(path.read_bytes()[offset : offset + size]) == crc32


def test_every_cut_is_a_fault_and_leaves_complete_samples(tmp_path: Path) -> None:
    (tmp_path / "whole.tar").write_bytes(THREE)
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = {member.name: member.offset_data + member.size for member in archive.getmembers()}
    end = max(ends.values())
    for cut in sorted({*range(1, end + 1, 97), *range(512, end + 1, 512)}):
        index = write_and_index(tmp_path / "0.tar", THREE[:cut])
        assert index.faults, cut
        for key in keys(index):
            assert ends[f"{key}.jpg"] <= cut


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_in_a_header_are_a_fault_and_do_not_end_the_scan(
    seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    # In name, mode, sizes, checksum, type or link.
    offset = int(rng.choice(OFFSETS)) + int(rng.integers(257))
    index = write_and_index(tmp_path / "0.tar", flipped(THREE, offset, int(rng.integers(8))))
    assert index.faults
    assert len(keys(index)) >= 2


NOT_TARS = {
    "empty": (b"", "empty"),
    "zeros": (bytes(10240), "no tar with files"),
    "garbage": (np.random.default_rng(0).bytes(5000), "no tar with files"),
    "html": (b"<html>not found</html>" * 100, "no tar with files"),
    "gzip": (b"\x1f\x8b" + bytes(600), "compressed by gzip: decompress it"),
}


@pytest.mark.parametrize("kind", NOT_TARS)
def test_files_that_are_no_tar(kind: str, tmp_path: Path) -> None:
    data, reason = NOT_TARS[kind]
    index = write_and_index(tmp_path / "0.tar", data)
    (fault,) = index.faults
    assert index.num_samples == 0
    assert (fault.key, fault.size) == ("", len(data))
    assert fault.reason.startswith(reason)


def test_concatenated_tars(tmp_path: Path) -> None:
    index = write_and_index(tmp_path / "0.tar", tar(sample("a")) + tar(sample("b")))
    assert keys(index) == ["a", "b"]
    assert index.faults == ()


@pytest.mark.parametrize(
    "field", [b"-0000000001\x00", b"\xff" * 12, b"77777777777\x00", b"\x80" + b"\xff" * 11]
)
def test_impossible_sizes_in_a_header(field: bytes, tmp_path: Path) -> None:
    """With a valid checksum: neither an endless loop nor an allocation of that size."""
    index = write_and_index(tmp_path / "0.tar", with_header(THREE, 0, slice(124, 136), field))
    assert "a" not in keys(index)
    assert index.faults


def test_whether_an_index_fits_its_shard(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    index = write_and_index(path, THREE)
    assert index.fault(Sources()) is None
    os.utime(path, (1, 1))  # copied: the same bytes with another date
    assert index.fault(Sources()) is None
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    assert index.fault(Sources()) == "has changed at byte 512 since it was indexed"
    path.write_bytes(data[:-512])
    assert "bytes and had" in str(index.fault(Sources()))


def test_paths_of_sidecar_files() -> None:
    assert sidecar_path("a/b.c.tar", "index", None) == Path("a/b.c.index.safetensors")
    one, other = (sidecar_path(f"{folder}/0.tar", "index", Path("cache")) for folder in "ab")
    assert one.parent == other.parent == Path("cache/shards")
    assert one != other
    assert one.name.endswith("-0.index.safetensors")
    with pytest.raises(UserError, match=r"http://h/0\.tar: .*: name one in data\.cache"):
        sidecar_path("http://h/0.tar", "index", None)


@pytest.mark.parametrize("workers", [1, 2])
def test_build_in_one_process_and_in_several(workers: int, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.tar") for number in range(3)]
    for path in paths:
        Path(path).write_bytes(THREE)
    build_indexes(paths, Sources(), None, workers, progress=False, parallel_bytes=0)
    assert all(read_index(index_path(path, None), path) for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for number in range(3) for name in (f"{number}.tar", f"{number}.index.safetensors")
    )


def test_a_killed_process_is_reported_and_the_next_call_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(tmp_path / f"{number}.tar") for number in range(2)]
    for path in paths:
        Path(path).write_bytes(THREE)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "build_index", die)
        with pytest.raises(JobError, match=r"was killed, .* run the same command again"):
            build_indexes(paths, Sources(), None, 2, progress=False, parallel_bytes=0)
    build_indexes(paths, Sources(), None, 2, progress=False)
    assert all(read_index(index_path(path, None), path) for path in paths)


def die(location: str, **options: object) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def test_a_damaged_index_counts_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    index = write_and_index(path, THREE)
    data = index.path.read_bytes()
    for spoiled in (b"", data[:40], json.dumps({}).encode()):
        index.path.write_bytes(spoiled)
        assert read_index(index.path, str(path)) is None


def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(THREE)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .* data\.cache"):
        build_indexes([str(tmp_path / "0.tar")], Sources(), tmp_path / "file", 1, progress=False)


# cascade index


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    """Seven samples in two tars, one damaged and one unusable."""
    (tmp_path / "a.tar").write_bytes(
        tar([*sample("0", jpg=jpeg(300, 90)), *sample("1"), *sample("2", txt=b"")])
    )
    (tmp_path / "b.tar").write_bytes(
        flipped(THREE, OFFSETS[2] + 5)[: OFFSETS[-1]] + tar([("x.jpg", html()), *sample("y")])
    )
    return tmp_path


def run_tool(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    dispatch(["index", *argv])
    return capsys.readouterr().out


def test_the_report_in_json(crawl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patterns = [f"{crawl}/a.tar", f"{crawl}/b.tar"]
    report = json.loads(run_tool(capsys, *patterns, "--weights", "3", "1", "--json"))
    assert (report["shards"], report["samples"], report["without_caption"]) == (2, 6, 2)
    assert report["bytes"] == sum((crawl / name).stat().st_size for name in ("a.tar", "b.tar"))
    assert [(each["samples"], each["share"]) for each in report["sets"]] == [(2, 0.75), (2, 0.25)]
    assert {name: count for name, count in report["shorter_side"].items() if count} == {
        "0-63": 5,
        "64-127": 1,
    }
    assert report["caption_length"] == {"min": 0, "median": 12, "max": 12}
    assert [fault["shard"] for fault in report["faults"]] == [patterns[1]] * 3
    assert [fault["key"] for fault in report["faults"]] == ["", "x", "b"]


def test_the_report_as_text(crawl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_tool(capsys, f"{crawl}/*.tar")
    assert text.splitlines()[0].startswith("6 samples in 2 shards, 0.00 GiB")
    assert "KEY.txt, characters: min 0, median 12, max 12; 2 samples have none" in text
    assert f"wrong: 3\n  {crawl}/b.tar:: damaged from byte" in text
    assert "nothing is wrong" in run_tool(capsys, f"{crawl}/a.tar")


def test_the_text_shows_the_first_faults_of_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tar").write_bytes(tar([(f"{i:04}.jpg", html()) for i in range(50)]))
    text = run_tool(capsys, f"{tmp_path}/*.tar")
    shown = text.count(f"{tmp_path}/a.tar:0")
    assert 0 < shown < 50
    assert f"wrong: 50\n  {tmp_path}/a.tar:0000: " in text
    assert text.endswith(f"and {50 - shown} more; --json lists them all\n")


def test_the_tool_rebuilds_outdated_indexes(
    crawl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tool(capsys, f"{crawl}/*.tar")
    times = {path.name: path.stat().st_mtime_ns for path in crawl.glob("*.safetensors")}
    (crawl / "a.tar").write_bytes(tar(sample("new")))
    assert json.loads(run_tool(capsys, f"{crawl}/*.tar", "--json"))["samples"] == 4
    after = {path.name: path.stat().st_mtime_ns for path in crawl.glob("*.safetensors")}
    assert after["b.index.safetensors"] == times["b.index.safetensors"]
    assert after["a.index.safetensors"] != times["a.index.safetensors"]


def test_a_report_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    report = json.loads(run_tool(capsys, f"{tmp_path}/a.tar", "--json"))
    assert (report["samples"], report["caption_length"]) == (0, {})
    assert "a.tar:: empty" in run_tool(capsys, f"{tmp_path}/a.tar")


@pytest.mark.parametrize("weights", [["1"], ["1", "0"], ["1", "2", "3"]])
def test_weights_that_do_not_match_the_shards(weights: list[str], crawl: Path) -> None:
    with pytest.raises(UserError, match=r"--weights: .* for 2 SHARDS; give one above 0 for each"):
        dispatch(["index", f"{crawl}/a.tar", f"{crawl}/b.tar", "--weights", *weights])


# Seconds that each scan is delayed, and shards.
SLOW = """
import sys, time
import pipeline.data.index as index
scan = index.scan
def slow_scan(file, size):
    time.sleep(float(sys.argv[1]))
    return scan(file, size)
index.scan = slow_scan
index.build_indexes(sys.argv[2:], index.Sources(), None, 1, progress=False)
"""


def test_processes_share_the_shards_and_take_over_from_a_killed_one(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.tar") for number in range(3)]
    for path in paths:
        Path(path).write_bytes(THREE)
    command = [sys.executable, "-W", "error", "-c", SLOW]
    with leaving_nothing(tmp_path) as start:
        slow = start([*command, "600", *paths])
        until(lambda: list(tmp_path.glob(".0.*.lock")), "a lock")
        fast = start([*command, "0", *paths])
        until((tmp_path / "2.index.safetensors").exists, "the last index")
        slow.kill()
        slow.wait(WAIT)
        assert fast.wait(WAIT) == 0
    assert all(read_index(index_path(path, None), path) for path in paths)
    assert not list(tmp_path.glob(".*"))
