"""The benchmarks at a tiny size: their reports and tables are right. No test asserts a speed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline import kernels
from pipeline.config import build
from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.errors import JobError, UserError
from pipeline.generate.cascade_folder import export
from pipeline.nn.unet import UNetConfig
from pipeline.stage.registry import read_stage_config
from tests.conftest import stage_yaml
from tools.bench import (
    compile,
    data,
    memory,
    peers,
    process,
    report,
    sample,
    scaling,
    steps,
    text,
    tiling,
    train,
)
from tools.bench.__main__ import ALL, BENCHES, main

pytestmark = pytest.mark.slow

# A case of `bench train` that compiles in seconds.
TINY = {
    "unet": {
        "kind": "adm",
        "channels": 16,
        "channel_mults": [1, 2],
        "num_blocks": [1, 1],
        "attention": ["none", "self"],
        "head_channels": 16,
        "text_channels": 16,
    },
    "size": 16,
    "batch": 2,
    "channels_in": 6,
    "num_levels": 2,
}


def cells(line: str) -> list[str]:
    """Of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def stage_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the configuration of a stage of `stage_yaml`."""

    def write(kind: str) -> Path:
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(stage_yaml(kind, tmp_path / kind, tmp_path, tmp_path)))
        return path

    return write


# Peers.


def fake_python(folder: Path, script: str) -> Path:
    """An environment whose interpreter is this shell script."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


@pytest.fixture
def fake_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Sets the script that stands for the interpreter of every environment that is created."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def set_script(script: str) -> None:
        monkeypatch.setattr(peers.venv, "create", lambda folder, **_: fake_python(folder, script))

    return set_script


@pytest.fixture
def no_peers(fake_environment: Callable[[str], None]) -> None:
    """A pip that finds no package."""
    fake_environment("echo >&2 ERROR: no torch; exit 1")


@pytest.fixture
def peers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This interpreter has the peers."""
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "interpreter", lambda peer: sys.executable)


@pytest.mark.usefixtures("no_peers")
def test_text_goes_on_without_a_peer_that_is_not_installed() -> None:
    result = text.measure(num=4, rounds=1, width=16, layers=1)
    assert list(result["rows"]) == ["text/ours"]
    assert result["failed"] == {"text/transformers": "not installed: ERROR: no torch"}
    assert result["ratios"] == {}
    assert result["tokens"] > text.SHORTEST
    assert "mindspore" in result["versions"]

    headings, _, ours, failed, *_, footer = text.table(result).splitlines()
    assert cells(ours)[0] == "text/ours"
    assert cells(failed)[:2] == [
        "text/transformers",
        "did not run: not installed: ERROR: no torch",
    ]
    assert len(cells(failed)) == len(cells(headings))
    assert footer.startswith("Medians of 1 rounds of 4 captions of ")


def test_a_peer_that_fails_is_not_run_again(
    tmp_path: Path, fake_environment: Callable[[str], None]
) -> None:
    """It is installed, and its worker fails."""
    log = tmp_path / "log"
    fails = f"echo run >>{log}; echo >&2 Traceback; echo >&2 ValueError: no; exit 1"
    fake_environment(f'test "$2" = pip || {{ {fails}; }}')

    failed: dict[str, str] = {}
    for _ in range(2):
        assert peers.run_peer(failed, "train_a/if", "if", "train", "if", "a") is None
    assert failed == {"train_a/if": "ValueError: no"}
    assert log.read_text() == "run\n"


def test_an_interrupted_installation_is_done_again(
    tmp_path: Path, fake_environment: Callable[[str], None]
) -> None:
    """The first pip is killed; the second installs; the third time nothing is to be done."""
    log = tmp_path / "log"
    fake_environment(f"echo pip >>{log}; test $(wc -l <{log}) -gt 1 || kill -9 $$")

    with pytest.raises(JobError, match="not installed: pip ended with -9"):
        peers.interpreter("twin")
    expected = peers.environment_folder() / "bin" / "python"
    assert peers.interpreter("twin") == peers.interpreter("twin") == expected
    assert log.read_text() == "pip\n" * 2


def test_other_pins_are_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = peers.environment_folder()
    monkeypatch.setitem(peers.REQUIREMENTS, "twin", ("torch==0",))
    assert peers.environment_folder() != before


def test_workers_are_found_where_this_project_is_not_installed(tmp_path: Path) -> None:
    """Without site-packages, so that the command alone says where the project is."""
    captions = tmp_path / "captions.txt"
    arguments = ("text", "transformers", tmp_path, captions, 8)
    with pytest.raises(RuntimeError, match=r"No such file or directory: .*captions\.txt"):
        process.run_json(sys.executable, "-I", "-S", "-c", peers.RUN_WORKER, *arguments)


def test_workers_do_not_inherit_variables_for_mindspore() -> None:
    """A worker has the environment that the bench was started with, not what `pipeline` added."""
    code = """
import json, os, sys
import pipeline
from tools.bench import process
os.environ["SET_LATER"] = "1"
code = "import json, os; print(json.dumps(dict(os.environ)))"
print(json.dumps([dict(os.environ), process.run_json(sys.executable, "-c", code)]))
"""
    environment = {**os.environ, "GIVEN": "1"}
    environment.pop("GLOG_v", None)
    argv = [sys.executable, "-c", code]
    output = subprocess.run(argv, env=environment, capture_output=True, check=True, timeout=120)
    mine, workers = json.loads(output.stdout)
    assert mine["GLOG_v"]
    assert workers["GIVEN"] == "1"
    assert not {"GLOG_v", "SET_LATER"} & workers.keys()


# Text.


def test_captions_have_all_lengths() -> None:
    captions = text.random_captions(300)
    tokens = [len(caption.split()) + 1 for caption in captions]
    assert (min(tokens), max(tokens)) == (text.SHORTEST, text.LONGEST)
    assert captions == text.random_captions(300)
    assert captions[:3] != captions[3:6]


@pytest.mark.parity
@pytest.mark.usefixtures("peers_here")
def test_both_implementations_encode_the_same_tokens() -> None:
    result = text.measure(num=4, rounds=1, width=16, layers=1)
    assert len({answers[0]["tokens"] for answers in result["rows"].values()}) == 1
    assert result["ratios"].keys() == {"text/transformers", "text/transformers_padded"}


# Sampling.


def test_sampling_is_reported_by_stage_and_through_all(stage_file: Callable[[str], Path]) -> None:
    chain = (stage_file("base"), stage_file("sr32"))
    result = sample.measure(rounds=1, batches=2, chain=chain)
    stages = [f"sample_{name}" for name in ("base", "sr32", "cascade")]
    assert result["rows"].keys() == {
        f"{name}/{side}" for name in stages for side in ("ours", "network")
    }
    assert result["ratios"].keys() == {f"{name}/network" for name in stages}

    base, sr32, whole = (result["rows"][f"{name}/ours"][0] for name in stages)
    assert whole["seconds"] == [
        (a + b) / 4 for a, b in zip(base["seconds"], sr32["seconds"], strict=True)
    ]
    assert (len(base["seconds"]), base["steps"], base["batch"]) == (2, 3, 4)
    assert cells(sample.table(result).splitlines()[2])[:4] == ["base", "0.22M", "3", "4"]


def test_larger_stages_are_the_demos_with_other_networks(tmp_path: Path) -> None:
    base: Any
    sr256: Any
    base, sr256 = (read_stage_config(path)[0] for path in sample.write_larger_stages(tmp_path))
    assert (base.size, sr256.size, sr256.low_res.size) == (64, 256, 64)
    assert base.unet == build(UNetConfig, train.CASES["base64"]["unet"])
    assert sr256.unet == build(UNetConfig, train.CASES["sr256"]["unet"])


def test_a_sampling_step_is_measured_tiled_and_untiled(stage_file: Callable[[str], Path]) -> None:
    result = tiling.measure(rounds=1, config=stage_file("sr32"), guidance={"guided": 2.0})
    assert list(result["rows"]) == ["tiling_guided/untiled", "tiling_guided/ours"]
    for answers in result["rows"].values():
        assert len(answers[0]["seconds"]) == 1
        assert answers[0]["peak"] > 0
    assert result["ratios"].keys() == {"tiling_guided/untiled"}
    assert cells(tiling.table(result).splitlines()[3])[0] == "guided/ours"


def test_steps_are_reported_by_stage_and_sampler(
    trained: Path, t5_folder: Path, tmp_path: Path
) -> None:
    stages = {name: trained / name / "stage" for name in ("base", "sr32")}
    export(stages, t5_folder, tmp_path / "cascade")
    result = steps.measure(
        tmp_path / "cascade",
        images=2,
        large=1,
        tried={"ddim": (2, 1)},
        reference=steps.Solver("ddim", 3),
    )

    solvers = ("ddim_3", "ddim_2", "ddim_1")
    assert list(result["rows"]) == [f"steps_{name}/{each}" for name in stages for each in solvers]
    distances = [result["rows"][f"steps_base/{each}"][0]["distance"] for each in solvers]
    assert distances[0] == 0
    assert min(distances[1:]) > 0
    assert [answers[0]["images"] for answers in result["rows"].values()] == [2] * 3 + [1] * 3
    assert cells(steps.table(result).splitlines()[2])[:2] == ["base/ddim_3", "0.00 %"]


# Reports.


def test_ratios_are_of_median_times() -> None:
    """Ours takes 0.2 s where the peer takes 0.4: half the time is twice as fast."""
    rows = {
        "text/transformers": [{"seconds": seconds} for seconds in (0.4, 0.8, 0.1)],
        "text/ours": [{"seconds": seconds} for seconds in (0.2, 0.1, 0.9)],
    }
    summary = report.summarize(rows, text.median_seconds)
    assert summary["ratios"] == {"text/transformers": 0.5}
    line = text.table({"captions": 8, "tokens": 9.5, **summary}).splitlines()[2]
    assert cells(line) == ["text/transformers", "20.0", "10.0 to 80.0", "2.00 x"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches in the place of all that `all` runs, each with one row and a figure of its own."""

    def fake(name: str) -> SimpleNamespace:
        rows = {
            f"{name}/peer": [{"seconds": 2.0}],
            f"{name}/ours": [{"seconds": 1.0, "versions": {name: "1"}}],
        }
        summary = report.summarize(rows, text.median_seconds, failed={f"{name}/gone": "why"})
        return SimpleNamespace(
            __doc__="Fake.",
            add_arguments=lambda parser: None,
            run=lambda _: {**summary, "rounds": 1},
            table=lambda _: f"table of {name}",
        )

    for name in ALL:
        monkeypatch.setitem(BENCHES, name, fake(name))


@pytest.mark.usefixtures("fakes")
def test_all_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["all"])
    tables = [f"## {name}\ntable of {name}\n" for name in ALL]
    assert capsys.readouterr().out == "\n".join(tables) + "\n"


@pytest.mark.usefixtures("fakes")
def test_all_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(["all", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"machine", "versions", "rows", "ratios", "failed", *ALL}
    assert result["versions"] == dict.fromkeys(ALL, "1")
    assert result["rows"].keys() == {f"{name}/{side}" for name in ALL for side in ("peer", "ours")}
    assert result["ratios"] == {f"{name}/peer": 0.5 for name in ALL}
    assert result["failed"] == {f"{name}/gone": "why" for name in ALL}
    assert result["train"] == {"rounds": 1}


@pytest.mark.usefixtures("fakes")
def test_json_replaces_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["text", "--json"])
    assert json.loads(capsys.readouterr().out)["ratios"] == {"text/peer": 0.5}
    main(["text"])
    assert capsys.readouterr().out == "table of text\n"


# Data.


@pytest.fixture(scope="module")
def noise_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 samples of 4 images of the data bench. The loader writes beside the tars."""
    folder = tmp_path_factory.mktemp("noise")
    data.write_shards(folder, num_samples=128, num_distinct=4)
    return folder


def test_images_of_the_data_bench_have_a_photographs_size_in_bytes(noise_shards: Path) -> None:
    shards = Shards.open(DataConfig(shards=f"{noise_shards}/*.tar"), progress=False)
    assert (len(shards), len(shards.indexes)) == (128, data.NUM_SHARDS)
    assert all(100_000 < len(shards.image(sample)) < 250_000 for sample in range(16))


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards: .* has no \*\.tar"):
        main(["data", "--shards", str(tmp_path)])


@pytest.mark.parametrize(("task", "cores"), [("64px", 1), ("256px_of_1024", 2)])
def test_every_implementation_of_the_data_bench_reads_images(
    task: str, cores: int, noise_shards: Path
) -> None:
    result = data.measure(
        seconds=1,
        rounds=1,
        cores=[cores],
        memory_samples=640,
        shards=noise_shards,
        tasks={task: data.TASKS[task]},
    )
    case = f"data_{task}_1core" if cores == 1 else f"data_{task}_{cores}cores"
    assert list(result["rows"]) == [f"{case}/{side}" for side in data.IMPLEMENTATIONS]
    assert all(answers[0]["images"] > 0 for answers in result["rows"].values())
    assert list(result["ratios"]) == [f"{case}/webdataset", f"{case}/decode"]
    assert [num for num, _ in result["resident"]] == [128, 256, 384, 512, 640]

    table = data.table(result)
    assert f"| {case} | images/s | lowest to highest | ours is |" in table
    assert "MiB after 640 samples." in table


# Scaling.


def test_metrics_give_speed_delay_and_start(tmp_path: Path) -> None:
    """Steps of 0.5 s; a checkpoint after the fourth that costs 0.25 s; slow first steps that do not
    count.
    """
    seconds = {1: 20.0, 2: 3.0, 3: 0.5, 4: 0.5, 5: 0.75, 6: 0.5, 7: 0.5, 8: 0.5}
    metrics = [
        json.dumps({"step": step, "seconds": taken, "images_per_second": 16 / taken})
        for step, taken in seconds.items()
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    os.utime(tmp_path / "metrics.jsonl", (1000.0, 1000.0))

    figures = scaling.read_metrics(tmp_path, half=4, started=900.0)
    assert figures == (32.0, 0.25, 100.0 - 6.25)


def test_efficiency_is_against_two_processes() -> None:
    speeds = {"scaling/one_process": 30.0, "scaling/two_processes": 50.0, "scaling/msrun": 45.0}
    rows = {
        name: [scaling.Figures(speed, 0.01, 9.0)._asdict()] * 2 for name, speed in speeds.items()
    }
    result = {"batch": 16, "steps": 60, "rows": rows, "machine": "m", "versions": {}}
    lines = scaling.table(result).splitlines()
    assert "| scaling/msrun | 45.0 | 45.0 to 45.0 | 90% | 10 ms | 9 s |" in lines


@pytest.mark.launchers
def test_the_scaling_bench_trains_in_every_setup(
    tmp_path: Path, stage_file: Callable[[str], Path]
) -> None:
    path = stage_file("base")
    config = yaml.safe_load(path.read_text())
    config["train"]["sample_every"] = 0
    path.write_text(yaml.safe_dump(config))

    tried = [setup for setup in scaling.setups() if setup.launcher != "mpirun"]
    result = scaling.measure(steps=8, rounds=1, config=path, tried=tried)
    assert list(result["rows"]) == ["scaling/one_process", "scaling/two_processes", "scaling/msrun"]
    assert list(result["ratios"]) == ["scaling_msrun/two_processes"]
    for answers in result["rows"].values():
        assert all(figures["images_per_second"] > 0 for figures in answers)
        assert all(figures["first_step"] > 0 for figures in answers)


# Training.


def test_operations_are_shares_of_the_fastest_matrix_product() -> None:
    """Ours takes 2 s where the twin takes 1; 500 x 10^9 operations at 1,000 x 10^9 a second, the
    largest rate, take half a second.
    """
    answer = {"parameters": 2_000_000, "first": 9.0, "peak": 2**30}
    counted = {**answer, "flops": 500 * 10**9, "matmul": 1000.0e9}
    slower = {**counted, "flops": 10**12, "matmul": 900.0e9}
    rows = {
        "train_a/ours": [{**answer, "seconds": [2.0, 2.0, 8.0]}],
        "train_a/twin": [{**counted, "seconds": [1.0, 0.5, 1.0]}],
        "train_a/imagen_pytorch": [{**slower, "seconds": [4.0]}],
        "train_a/if": [],
    }
    failed = {"train_a/if": "ValueError: no"}
    summary = report.summarize(rows, train.median_seconds, failed=failed)
    assert summary["ratios"] == {"train_a/twin": 2.0, "train_a/imagen_pytorch": 0.5}

    lines = train.table({**summary, "steps": 3}).splitlines()[2:6]
    assert [cells(line)[:7] for line in lines] == [
        ["train_a/ours", "2.0M", "2.00", "2.00 to 8.00", "1.00 x", "500", "25%"],
        ["train_a/twin", "2.0M", "1.00", "0.50 to 1.00", "2.00 x", "500", "50%"],
        ["train_a/imagen_pytorch", "2.0M", "4.00", "4.00 to 4.00", "0.50 x", "1000", "25%"],
        ["train_a/if", "did not run: ValueError: no", *[""] * 5],
    ]
    assert cells(lines[0])[7:] == ["9 s", "1.00 GiB"]


@pytest.mark.usefixtures("no_peers")
def test_training_goes_on_without_the_twin() -> None:
    result = train.measure(
        steps=2, rounds=1, cases={"tiny": TINY}, implementations=("ours", "twin")
    )
    assert list(result["rows"]) == ["train_tiny/ours"]
    assert list(result["failed"]) == ["train_tiny/twin"]
    assert cells(train.table(result).splitlines()[2])[5:7] == ["not counted", "not counted"]


@pytest.mark.parity
@pytest.mark.usefixtures("peers_here")
def test_both_implementations_train_the_same_network() -> None:
    result = train.measure(
        steps=2, rounds=1, cases={"tiny": TINY}, implementations=("ours", "twin")
    )
    (ours,), (twin,) = result["rows"].values()
    assert ours["parameters"] == twin["parameters"]
    assert len(ours["seconds"]) == len(twin["seconds"]) == 2
    assert min(ours["peak"], twin["peak"], twin["flops"], twin["matmul"]) > 0
    assert {"mindspore", "torch"} <= result["versions"].keys()
    ratio = train.median_seconds([ours]) / train.median_seconds([twin])
    assert result["ratios"] == {"train_tiny/twin": ratio}


def test_compilation_is_reported_with_and_without_the_cache(
    stage_file: Callable[[str], Path],
) -> None:
    result = compile.measure(rounds=1, cases={"tiny": TINY}, stages={"base": stage_file("base")})
    assert result["rows"].keys() == {
        "compile_tiny/compiled",
        "compile_tiny/ours",
        "compile_base/gradient",
    }
    assert result["rows"]["compile_base/gradient"][0]["nodes"] > 100
    assert result["ratios"]["compile_tiny/compiled"] > 0

    first_column = [cells(line)[0] for line in compile.table(result).splitlines() if line]
    assert first_column[:-1] == [
        "first step",
        "---",
        "tiny",
        "gradient of one image",
        "---",
        "base",
    ]


@pytest.mark.skipif(
    kernels.library() is None, reason="the prediction is for the kernels, which are not built here"
)
def test_a_training_needs_the_predicted_memory() -> None:
    """The demo's base, as `cascade train` runs it, in a process that loads its graphs."""
    training = memory.Training(network="tiny/base64", changes={"data.global_batch": 64})
    result = memory.measure(steps=4, trainings={"tiny": training})
    (answer,) = result["rows"]["memory/tiny"]
    assert answer["predicted"] == pytest.approx(answer["peak"], rel=0.15)
    assert answer["predicted"] == answer["memory"]["total"]
    assert cells(memory.table(result).splitlines()[2])[:2] == ["tiny", "0.9M"]
