"""The benchmarks' parts at a tiny size: what they tell is right; how fast anything is, no test says."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import UserError
from tests.conftest import stage_yaml
from tools.bench import data, scaling, text, train, turns
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


def test_a_runs_reports_give_speed_stop_and_start(tmp_path: Path) -> None:
    """Steps of 0.5 s, a checkpoint after the fourth that costs 0.25 s, slow first ones that do not count."""
    seconds = {1: 20.0, 2: 3.0, 3: 0.5, 4: 0.5, 5: 0.75, 6: 0.5, 7: 0.5, 8: 0.5}
    lines = [json.dumps({"step": n, "seconds": s, "images_per_second": 16 / s}) for n, s in seconds.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    os.utime(tmp_path / "metrics.jsonl", (1000.0, 1000.0))
    figures = scaling.read(tmp_path, half=4, begun=900.0)
    assert figures == {"images_per_second": 32.0, "checkpoint": 0.25, "first_step": 100.0 - 6.25}


def test_the_share_is_of_two_processes() -> None:
    figures = {"one process": 30.0, "two processes": 50.0, "msrun": 45.0}
    sides = {n: [{"images_per_second": s, "checkpoint": 0.01, "first_step": 9.0}] * 2 for n, s in figures.items()}
    report = {"batch": 16, "steps": 60, "sides": sides, "machine": "m", "versions": {"mindspore": "2.9.0"}}
    assert "| msrun | 45.0 | 45.0 to 45.0 | 90% | 10 ms | 9 s |" in scaling.table(report)


@pytest.mark.launchers
def test_the_scaling_benchmark_trains_on_every_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "which", lambda name: None)
    config = stage_yaml("base", tmp_path / "run", tmp_path, tmp_path)
    config["train"]["sample_every"] = 0
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    report = scaling.measure(steps=8, rounds=1, config=tmp_path / "base.yaml")
    assert list(report["sides"]) == ["one process", "two processes", "msrun"]
    assert all(figures["images_per_second"] > 0 for rounds in report["sides"].values() for figures in rounds)
    assert all(figures["first_step"] > 0 for rounds in report["sides"].values() for figures in rounds)


def test_a_steps_share_of_the_machine() -> None:
    """Ours takes 2 s where the twin takes 1; 500 operations at 1,000 a second take half a second."""
    answer = {"parameters": 2_000_000, "first": 9.0, "peak": 2**30}
    rows = {
        "base64/ours": [{**answer, "seconds": [2.0, 2.0, 8.0]}],
        "base64/twin": [{**answer, "seconds": [1.0, 0.5, 1.0], "flops": 500, "matmul": 1000.0}],
    }
    report = {"rows": rows, "steps": 3, "machine": "m", "versions": {"torch": "1"}}
    lines = train.table(report).splitlines()
    assert lines[2] == "| base64/ours | 2.0M | 2.00 | 2.00 to 8.00 | 2.00 x | 25% | 9 s | 1.00 GiB |"
    assert lines[3] == "| base64/twin | 2.0M | 1.00 | 0.50 to 1.00 | 1.00 x | 50% | 9 s | 1.00 GiB |"


@pytest.mark.parity
def test_both_sides_train_the_same_network() -> None:
    pytest.importorskip("torch")
    unet = {"kind": "adm", "channels": 16, "channel_mults": [1, 2], "num_blocks": [1, 1], "attention": ["none", "self"],
            "head_channels": 16, "text_channels": 16}  # fmt: skip
    case = {"unet": unet, "size": 16, "batch": 2, "channels_in": 6, "num_levels": 2}
    report = train.measure(steps=2, rounds=1, cases={"tiny": case})
    (ours,), (twin,) = report["rows"].values()
    assert ours["parameters"] == twin["parameters"]
    assert len(ours["seconds"]) == len(twin["seconds"]) == 2
    assert min(ours["peak"], twin["peak"], twin["flops"], twin["matmul"]) > 0
    assert list(report["ratios"]) == ["train_tiny/twin"]
    assert report["ratios"]["train_tiny/twin"] == train.speed([ours]) / train.speed([twin])
