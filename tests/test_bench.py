"""The benchmarks' parts at a tiny size: what they tell is right; how fast anything is, no test says."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import UserError
from tools.bench import data, text, turns
from tools.bench.__main__ import main


def test_captions_are_spread_over_the_lengths() -> None:
    captions = text.captions(300)
    words = [len(caption.split()) + 1 for caption in captions]
    assert (min(words), max(words)) == (text.SHORTEST, text.LONGEST)
    assert captions == text.captions(300)
    assert captions[:3] != text.captions(300)[3:6]


def test_our_side_counts_tokens_and_rounds() -> None:
    report = text.measure(num=4, rounds=2, sides=("ours",), width=16)
    assert [len(found) for found in report["captions_per_second"].values()] == [2]
    assert report["tokens"] > text.SHORTEST
    assert {"mindspore", "transformers"} <= report["versions"].keys()
    lines = text.table(report).splitlines()
    assert lines[2].startswith("| ours | ")
    assert lines[-1].startswith("Medians of 2 rounds of 4 captions of ")


@pytest.mark.parity
def test_both_sides_encode_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    answers = []
    ask = turns.ask
    monkeypatch.setattr(turns, "ask", lambda *arguments: answers.append(ask(*arguments)) or answers[-1])
    report = text.measure(num=4, rounds=1, width=16)
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert len(report["captions_per_second"]) == 3


def test_ratios_are_of_medians() -> None:
    speeds = {"theirs": [10.0, 20.0, 90.0], "ours": [30.0, 50.0, 40.0]}
    report = {"captions": 8, "tokens": 9.5, "captions_per_second": speeds, "machine": "m", "versions": {"a": "1"}}
    assert text.table(report).splitlines()[2] == "| theirs | 20.0 | 10.0 to 90.0 | 2.00 x |"


@pytest.mark.skipif(find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"imagen-cascade\[parity\]"):
        main(["text"])


def test_a_report_that_has_no_place_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent is no folder; make it or name another file"):
        main(["text", "--json", str(tmp_path / "absent" / "report.json")])


def test_pictures_of_the_data_benchmark_have_a_photographs_bytes(tmp_path: Path) -> None:
    data.write(tmp_path, 16)
    shards = Shards.open(DataConfig(shards=f"{tmp_path}/*.tar"), progress=False)
    assert (len(shards), len(shards.indexes)) == (16, data.SHARDS)
    assert all(100_000 < len(shards.image(number)) < 250_000 for number in range(16))


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--shards .*: no \*\.tar there"):
        main(["data", "--shards", str(tmp_path)])


def test_every_side_of_the_data_benchmark_gives_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TASKS", {"64 px": (64, 64), "crops": (1024, 256)})
    report = data.measure(seconds=1, rounds=1, cores=[1, 2], memory=640, samples=128)
    assert list(report["pictures_per_second"]) == ["64 px, 1 core", "64 px, 2 cores", "crops, 1 core", "crops, 2 cores"]
    for found in report["pictures_per_second"].values():
        assert found.keys() == data.SIDES.keys()
        assert all(speed > 0 for rounds in found.values() for speed in rounds)
    assert [number for number, _ in report["resident"]] == [128, 256, 384, 512, 640]
    text = data.table(report)
    assert "| 64 px, 1 core | pictures/s | lowest to highest | ours is |" in text
    assert "MiB after 640 samples." in text
