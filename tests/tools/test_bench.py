"""The benchmarks' parts at a tiny size: what they tell is right; how fast anything is, no test
says.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipeline import kernels, runtime
from pipeline.config import build
from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import JobError, UserError
from pipeline.nn.unet import UNetConfig
from pipeline.stage.registry import read_stage_config
from tests.conftest import stage_yaml
from tools.bench import (
    compile,
    data,
    memory,
    peers,
    sample,
    scaling,
    steps,
    text,
    train,
    turns,
    whole,
)
from tools.bench.__main__ import ALL, BENCHES, main


def test_captions_are_spread_over_the_lengths() -> None:
    captions = text.captions(300)
    words = [len(caption.split()) + 1 for caption in captions]
    assert (min(words), max(words)) == (text.SHORTEST, text.LONGEST)
    assert captions == text.captions(300)
    assert captions[:3] != text.captions(300)[3:6]


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is installed: a pip that finds no package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        peers.venv,
        "create",
        lambda place, **_: fake_python(place, "echo >&2 ERROR: no torch; exit 1"),
    )


def fake_python(place: Path, script: str) -> Path:
    """An environment whose interpreter is this shell script."""
    python = place / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


@pytest.mark.usefixtures("no_peers")
def test_a_peer_that_does_not_install_is_told_and_ours_goes_on() -> None:
    report = text.measure(num=4, rounds=2, width=16)
    assert {name: len(rounds) for name, rounds in report["rows"].items()} == {"text/ours": 2}
    assert report["failed"] == {"text/transformers": "not installed: ERROR: no torch"}
    assert report["ratios"] == {}
    assert report["tokens"] > text.SHORTEST
    assert "mindspore" in report["versions"]
    lines = text.table(report).splitlines()
    assert lines[2].startswith("| text/ours | ")
    assert lines[3].startswith("| text/transformers | did not run: not installed: ")
    assert lines[3].count("|") == lines[0].count("|")
    assert lines[-1].startswith("Medians of 2 rounds of 4 captions of ")


def test_a_peer_that_does_not_run_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fake_python(
        tmp_path,
        f"echo asked >>{tmp_path}/log; echo >&2 Traceback; echo >&2 ValueError: no; exit 1",
    )
    monkeypatch.setattr(peers, "python", lambda peer: script)
    failed: dict[str, str] = {}
    for _ in range(2):
        assert peers.ask(failed, "train_a/if", "if", "train_side.py", "if", "a") is None
    assert failed == {"train_a/if": "ValueError: no"}
    assert (tmp_path / "log").read_text() == "asked\n"


def test_a_half_made_environment_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first `pip` is killed; the second time it is asked again, and the third time nothing is
    to do.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log = tmp_path / "log"
    killed = f"echo pip >>{log}; test $(wc -l <{log}) -gt 1 || kill -9 $$"
    monkeypatch.setattr(peers.venv, "create", lambda place, **_: fake_python(place, killed))
    with pytest.raises(JobError, match="not installed: pip ended with -9"):
        peers.python("twin")
    assert peers.python("twin") == peers.python("twin") == peers.folder() / "bin" / "python"
    assert log.read_text() == "pip\n" * 2


def test_other_pins_are_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = peers.folder()
    monkeypatch.setitem(peers.NEEDS, "twin", ("torch==0",))
    assert peers.folder() != before


def test_sides_do_not_inherit_what_mindspore_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests import `pipeline` first, as the bench does."""
    monkeypatch.setenv("SET_LATER", "1")
    assert "SET_LATER" not in runtime.initial_environment()
    assert runtime.initial_environment()["PATH"]
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    assert turns.ask(sys.executable, "-c", code).items() >= runtime.initial_environment().items()


@pytest.mark.parity
def test_both_sides_encode_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "python", lambda peer: sys.executable)
    report = text.measure(num=4, rounds=1, width=16)
    assert len({rounds[0]["tokens"] for rounds in report["rows"].values()}) == 1
    assert report["ratios"].keys() == {"text/transformers", "text/transformers_padded"}


def test_sampling_is_told_by_stage_and_through_all(tmp_path: Path) -> None:
    configs = []
    for kind in ("base", "sr32"):
        raw = stage_yaml(kind, tmp_path / kind, tmp_path, tmp_path)
        configs.append(tmp_path / f"{kind}.yaml")
        configs[-1].write_text(yaml.safe_dump(raw))
    report = sample.measure(rounds=1, batches=2, configs=tuple(configs))
    stages = [f"sample_{name}" for name in ("base", "sr32", "cascade")]
    assert report["rows"].keys() == {
        f"{name}/{side}" for name in stages for side in ("ours", "network")
    }
    assert report["ratios"].keys() == {f"{name}/network" for name in stages}
    one, other, whole = (report["rows"][f"{name}/ours"][0] for name in stages)
    assert whole["seconds"] == [
        (a + b) / 4 for a, b in zip(one["seconds"], other["seconds"], strict=True)
    ]
    assert (len(one["seconds"]), one["steps"], one["batch"]) == (2, 3, 4)
    assert sample.table(report).splitlines()[2].startswith("| base | 0.22M | 3 | 4 | ")


def test_larger_stages_are_the_demos_with_other_networks(tmp_path: Path) -> None:
    base, sr256 = (read_stage_config(path)[0] for path in sample.larger(tmp_path))
    assert (base.size, sr256.size, sr256.low_res.size) == (64, 256, 64)
    assert base.unet == build(UNetConfig, train.CASES["base64"]["unet"])
    assert sr256.unet == build(UNetConfig, train.CASES["sr256"]["unet"])


def test_a_whole_step_is_told_in_bands_and_at_once(tmp_path: Path) -> None:
    config = tmp_path / "sr32.yaml"
    config.write_text(yaml.safe_dump(stage_yaml("sr32", tmp_path / "run", tmp_path, tmp_path)))
    report = whole.measure(rounds=1, config=config, guidance={"guided": 2.0})
    assert list(report["rows"]) == ["whole_guided/at_once", "whole_guided/ours"]
    assert all(
        len(rounds[0]["seconds"]) == 1 and rounds[0]["peak"] > 0
        for rounds in report["rows"].values()
    )
    assert report["ratios"].keys() == {"whole_guided/at_once"}
    assert whole.table(report).splitlines()[3].startswith("| guided/ours | 0.")


def test_steps_are_told_by_stage_and_sampler(trained: Path) -> None:
    report = steps.measure(trained / "cascade", 2, 1, {"ddim": (3, 2), "ddpm": (2,)}, ("ddim", 3))
    ways = ("ddim_3", "ddim_2", "ddpm_2")
    assert list(report["rows"]) == [
        f"steps_{name}/{way}" for name in ("base", "sr32", "sr64") for way in ways
    ]
    assert [report["rows"][f"steps_base/{way}"][0]["distance"] > 0 for way in ways] == [
        False,
        True,
        True,
    ]
    assert [rounds[0]["images"] for rounds in report["rows"].values()] == [2] * 3 + [1] * 6
    assert steps.table(report).splitlines()[2].startswith("| base/ddim_3 | 0.00 % | ")


def test_ratios_are_of_medians_and_in_time() -> None:
    """Ours takes 0.2 s where they take 0.4: half the time is twice as fast."""
    rows = {
        "text/transformers": [{"seconds": s} for s in (0.4, 0.8, 0.1)],
        "text/ours": [{"seconds": s} for s in (0.2, 0.1, 0.9)],
    }
    report = {"captions": 8, "tokens": 9.5, **turns.report(rows, text.seconds, {})}
    assert report["ratios"] == {"text/transformers": 0.5}
    assert (
        text.table(report).splitlines()[2] == "| text/transformers | 20.0 | 10.0 to 80.0 | 2.00 x |"
    )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches in the place of all that `all` runs, each with one row and a figure of its own."""

    def fake(name: str) -> SimpleNamespace:
        rows = {
            f"{name}/peer": [{"seconds": 2.0}],
            f"{name}/ours": [{"seconds": 1.0, "versions": {name: "1"}}],
        }
        report = {**turns.report(rows, text.seconds, {f"{name}/gone": "why"}), "rounds": 1}
        return SimpleNamespace(
            __doc__="Fake.",
            add_arguments=lambda parser: None,
            run=lambda _: report,
            table=lambda _: f"table of {name}",
        )

    for name in ALL:
        monkeypatch.setitem(BENCHES, name, fake(name))


@pytest.mark.usefixtures("fakes")
def test_all_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["all"])
    assert (
        capsys.readouterr().out == "\n".join(f"## {name}\ntable of {name}\n" for name in ALL) + "\n"
    )


@pytest.mark.usefixtures("fakes")
def test_all_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(["all", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"machine", "versions", "rows", "ratios", "failed", *ALL}
    assert report["versions"] == dict.fromkeys(ALL, "1")
    assert report["rows"].keys() == {f"{name}/{side}" for name in ALL for side in ("peer", "ours")}
    assert report["ratios"] == {f"{name}/peer": 0.5 for name in ALL}
    assert report["failed"] == {f"{name}/gone": "why" for name in ALL}
    assert report["train"] == {"rounds": 1}


@pytest.mark.usefixtures("fakes")
def test_json_takes_the_tables_place(capsys: pytest.CaptureFixture[str]) -> None:
    main(["text", "--json"])
    assert json.loads(capsys.readouterr().out)["ratios"] == {"text/peer": 0.5}
    main(["text"])
    assert capsys.readouterr().out == "table of text\n"


def test_pictures_of_the_data_benchmark_have_a_photographs_bytes(tmp_path: Path) -> None:
    data.write(tmp_path, 16)
    shards = Shards.open(DataConfig(shards=f"{tmp_path}/*.tar"), progress=False)
    assert (len(shards), len(shards.indexes)) == (16, data.SHARDS)
    assert all(100_000 < len(shards.image(number)) < 250_000 for number in range(16))


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--shards .*: no \*\.tar there"):
        main(["data", "--shards", str(tmp_path)])


def test_every_side_of_the_data_benchmark_gives_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TASKS", {"64px": (64, 64), "crops": (1024, 256)})
    report = data.measure(seconds=1, rounds=1, cores=[1, 2], memory=640, samples=128)
    cases = ["data_64px_1core", "data_64px_2cores", "data_crops_1core", "data_crops_2cores"]
    assert list(report["rows"]) == [f"{case}/{side}" for case in cases for side in data.SIDES]
    assert all(answer["pictures"] > 0 for rounds in report["rows"].values() for answer in rounds)
    assert list(report["ratios"]) == [
        f"{case}/{side}" for case in cases for side in data.SIDES if side != "ours"
    ]
    assert [number for number, _ in report["resident"]] == [128, 256, 384, 512, 640]
    text = data.table(report)
    assert "| data_64px_1core | pictures/s | lowest to highest | ours is |" in text
    assert "MiB after 640 samples." in text


def test_a_runs_reports_give_speed_stop_and_start(tmp_path: Path) -> None:
    """Steps of 0.5 s, a checkpoint after the fourth that costs 0.25 s, slow first ones that do not
    count.
    """
    seconds = {1: 20.0, 2: 3.0, 3: 0.5, 4: 0.5, 5: 0.75, 6: 0.5, 7: 0.5, 8: 0.5}
    lines = [
        json.dumps({"step": n, "seconds": s, "images_per_second": 16 / s})
        for n, s in seconds.items()
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    os.utime(tmp_path / "metrics.jsonl", (1000.0, 1000.0))
    figures = scaling.read(tmp_path, half=4, begun=900.0)
    assert figures == {"images_per_second": 32.0, "checkpoint": 0.25, "first_step": 100.0 - 6.25}


def test_the_share_is_of_two_processes() -> None:
    figures = {"scaling/one_process": 30.0, "scaling/two_processes": 50.0, "scaling/msrun": 45.0}
    rows = {
        n: [{"images_per_second": s, "checkpoint": 0.01, "first_step": 9.0}] * 2
        for n, s in figures.items()
    }
    report = {
        "batch": 16,
        "steps": 60,
        "rows": rows,
        "machine": "m",
        "versions": {"mindspore": "2.9.0"},
    }
    assert "| scaling/msrun | 45.0 | 45.0 to 45.0 | 90% | 10 ms | 9 s |" in scaling.table(report)


@pytest.mark.launchers
def test_the_scaling_benchmark_trains_on_every_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "which", lambda name: None)
    config = stage_yaml("base", tmp_path / "run", tmp_path, tmp_path)
    config["train"]["sample_every"] = 0
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    report = scaling.measure(steps=8, rounds=1, config=tmp_path / "base.yaml")
    assert list(report["rows"]) == ["scaling/one_process", "scaling/two_processes", "scaling/msrun"]
    assert list(report["ratios"]) == ["scaling_msrun/two_processes"]
    assert all(
        figures["images_per_second"] > 0 for rounds in report["rows"].values() for figures in rounds
    )
    assert all(
        figures["first_step"] > 0 for rounds in report["rows"].values() for figures in rounds
    )


def test_a_steps_share_of_the_machine() -> None:
    """Ours takes 2 s where the twin takes 1; 500 operations at 1,000 a second, the most seen, take
    half a second.
    """
    answer = {"parameters": 2_000_000, "first": 9.0, "peak": 2**30}
    counted = {**answer, "flops": 500 * 10**9, "matmul": 1000.0e9}
    rows = {
        "train_a/ours": [{**answer, "seconds": [2.0, 2.0, 8.0]}],
        "train_a/twin": [{**counted, "seconds": [1.0, 0.5, 1.0]}],
        "train_a/imagen_pytorch": [
            {**counted, "seconds": [4.0], "flops": 10**12, "matmul": 900.0e9}
        ],
        "train_a/if": [],
    }
    report = {**turns.report(rows, train.speed, {"train_a/if": "ValueError: no"}), "steps": 3}
    assert report["ratios"] == {"train_a/twin": 2.0, "train_a/imagen_pytorch": 0.5}
    assert train.table(report).splitlines()[2:6] == [
        "| train_a/ours | 2.0M | 2.00 | 2.00 to 8.00 | 1.00 x | 500 | 25% | 9 s | 1.00 GiB |",
        "| train_a/twin | 2.0M | 1.00 | 0.50 to 1.00 | 2.00 x | 500 | 50% | 9 s | 1.00 GiB |",
        "| train_a/imagen_pytorch | 2.0M | 4.00 | 4.00 to 4.00 | 0.50 x | 1000 | 25% | 9 s | 1.00 GiB |",
        "| train_a/if | did not run: ValueError: no | | | | | | | |",
    ]


TINY = {"unet": {"kind": "adm", "channels": 16, "channel_mults": [1, 2], "num_blocks": [1, 1],
                 "attention": ["none", "self"], "head_channels": 16, "text_channels": 16},
        "size": 16, "batch": 2, "channels_in": 6, "num_levels": 2}  # fmt: skip


def test_compilation_is_told_with_and_without_the_kept_graphs(tmp_path: Path) -> None:
    stage = tmp_path / "base.yaml"
    stage.write_text(yaml.safe_dump(stage_yaml("base", tmp_path / "run", tmp_path, tmp_path)))
    report = compile.measure(rounds=1, cases={"tiny": TINY}, stages={"base": stage})
    assert report["rows"].keys() == {
        "compile_tiny/compiled",
        "compile_tiny/ours",
        "compile_base/gradient",
    }
    assert report["rows"]["compile_base/gradient"][0]["nodes"] > 100
    assert report["ratios"]["compile_tiny/compiled"] > 0
    assert [line.split(" |")[0] for line in compile.table(report).splitlines() if line] == [
        *(
            "|",
            "|---|---|---|---|---|",
            "| tiny",
            "| gradient of one picture",
            "|---|---|---|---|",
            "| base",
        ),
        compile.table(report).splitlines()[-1],
    ]


@pytest.mark.skipif(
    kernels.library() is None, reason="foretold for the kernels, which are not built here"
)
def test_a_training_holds_what_was_foretold() -> None:
    """The demo's base, as `cascade train` runs it, in a process of its own that finds its graphs."""
    report = memory.measure(steps=4, rows={"tiny": ("tiny/base64", {"data.global_batch": 64})})
    (answer,) = report["rows"]["memory/tiny"]
    assert answer["predicted"] == pytest.approx(answer["peak"], rel=0.15)
    assert answer["predicted"] == answer["memory"]["total"]
    assert memory.table(report).splitlines()[2].startswith("| tiny | 0.9M | ")


@pytest.mark.usefixtures("no_peers")
def test_without_the_twin_ours_is_told_alone() -> None:
    report = train.measure(steps=2, rounds=1, cases={"tiny": TINY}, sides=("ours", "twin"))
    assert list(report["rows"]) == ["train_tiny/ours"]
    assert list(report["failed"]) == ["train_tiny/twin"]
    assert "| not counted | not counted |" in train.table(report).splitlines()[2]


@pytest.mark.parity
def test_both_sides_train_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "python", lambda peer: sys.executable)
    report = train.measure(steps=2, rounds=1, cases={"tiny": TINY}, sides=("ours", "twin"))
    (ours,), (twin,) = report["rows"].values()
    assert ours["parameters"] == twin["parameters"]
    assert len(ours["seconds"]) == len(twin["seconds"]) == 2
    assert min(ours["peak"], twin["peak"], twin["flops"], twin["matmul"]) > 0
    assert {"mindspore", "torch"} <= report["versions"].keys()
    assert report["ratios"] == {"train_tiny/twin": train.speed([ours]) / train.speed([twin])}
