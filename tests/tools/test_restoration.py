"""The tool that measures restored images: its scores, and a whole run of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.imaging.contact_sheet import CAPTION_HEIGHT, GAP, MIN_SIDE
from pipeline.imaging.degradations import TASKS
from tests.generate.test_restore import run  # noqa: F401  (a fixture)
from tools.restoration import (
    HEADINGS,
    HOLE_GREY,
    MAX_PSNR,
    NamedImage,
    cases_of,
    main,
    score,
    shown,
)

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


def random_image(side: int) -> np.ndarray:
    return RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_scores_agree_with_their_definitions() -> None:
    truth = random_image(24)
    noisy = np.clip(truth + RNG.normal(0, 8, truth.shape), 0, 255).astype(np.uint8)
    psnr, ssim = score(noisy, truth)
    error = np.mean((noisy.astype(np.float64) - truth) ** 2)
    assert psnr == pytest.approx(10 * np.log10(255**2 / error))
    assert 0.5 < ssim < 1
    assert score(truth, truth) == (MAX_PSNR, 1.0)


@pytest.mark.parametrize("task", TASKS)
def test_known_pixels_are_the_truth_and_holes_are_grey(task: str) -> None:
    images = [NamedImage("x", random_image(32))]
    (case,) = cases_of(task, images, seed=0)[task]
    known = case.degraded.mask[0] == 0
    assert (shown(case)[known] == case.truth[known]).all()
    if known.any():
        assert (shown(case)[~known] == HOLE_GREY).all()

    (again,) = cases_of(task, images, seed=0)[task]
    assert (again.degraded.source == case.degraded.source).all()


def test_inpainting_is_measured_with_centre_holes_too() -> None:
    images = [NamedImage(name, random_image(32)) for name in ("x", "y")]
    drawn, centre = cases_of("inpainting", images, seed=0).values()
    assert [case.degraded.mask.mean() for case in centre] == [0.25, 0.25]
    assert all(case.degraded.mask[0, 8:24, 8:24].all() for case in centre)
    assert (drawn[0].degraded.mask != drawn[1].degraded.mask).any()
    assert list(cases_of("uncropping", images, seed=0)) == ["uncropping"]


def test_a_whole_run(
    run: Path,  # noqa: F811
    shards_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    stage = run / "stage"
    shards = f"{shards_folder}/*.tar"
    argv = f"{stage} --shards {shards} --out {out} --num 2 --samples 2".split()
    main(argv)

    lines = capsys.readouterr().out.splitlines()
    inpainting, centre, colorization = (line.strip("| ").split(" | ") for line in lines[2:5])
    titles = [inpainting[0], centre[0], colorization[0]]
    assert titles == ["inpainting", "inpainting_centre", "colorization"]
    assert len(set(inpainting)) == 6
    assert colorization[1] == colorization[2] == colorization[3]  # all grey
    assert lines[5].startswith("PSNR in dB (SSIM), means of 2 images; 2 samples of each")
    with Image.open(out / "overview.png") as image:
        assert image.height == GAP + 3 * (MIN_SIDE + GAP + CAPTION_HEIGHT)
    assert len((out / "inpainting" / "manifest.jsonl").read_text().splitlines()) == 2 * 4

    # The same command again restores nothing; with a mean chroma, one baseline changes.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    main([*argv, "--train", shards])
    again = capsys.readouterr().out.splitlines()
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    assert [line for line in again if line not in lines] == [again[4]]
    cells = again[4].strip("| ").split(" | ")
    changed = [i for i, cell in enumerate(cells) if cell != colorization[i]]
    assert changed == [HEADINGS.index("baseline")]


def test_a_stage_that_does_not_restore_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an image-to-image stage"):
        main([str(trained / "cascade"), "--shards", "x.tar", "--out", str(tmp_path)])


def test_two_stages_of_one_task_are_refused(run: Path, tmp_path: Path) -> None:  # noqa: F811
    stage = str(run / "stage")
    with pytest.raises(
        UserError, match=r"trained for inpainting, as .*stage was; measure one after the other"
    ):
        main([stage, stage, "--shards", "x.tar", "--out", str(tmp_path)])
