"""All that can be said on the command line of `cascade`."""

import argparse
from pathlib import Path

from pipeline.terminal import Parser, positive, positive_number


def parser() -> Parser:
    """All that can be said on the command line."""
    top = Parser(
        prog="cascade",
        description="Train the stages of an Imagen-style cascade and sample from them.",
    )
    commands = top.add_subparsers(
        dest="command",
        required=True,
        metavar="check|train|train-all|status|sample|edit|restore|explore",
    )

    check = commands.add_parser(
        "check", help="what a configuration or a cascade amounts to, before anything runs"
    )
    check.add_argument(
        "path", metavar="CONFIG|CASCADE", help="a YAML file of configs/, or a cascade folder"
    )
    check.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="instead of the file's, as data.global_batch=8",
    )
    check.add_argument(
        "--memory",
        metavar="GIB",
        type=positive_number,
        help="of a device: whether a training fits, else what to turn on",
    )
    check.add_argument("--json", action="store_true", help="one JSON object instead of text")

    train = commands.add_parser("train", help="train one stage; the same command again resumes")
    train.add_argument("path", metavar="CONFIG", help="a YAML file of configs/")
    train.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="instead of the file's, as train.steps=1000",
    )

    every = commands.add_parser(
        "train-all", help="train all stages of a cascade, each as a job of its own"
    )
    every.add_argument(
        "path", metavar="CASCADE", help="a cascade's YAML file, as configs/cascade.yaml"
    )
    every.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for every stage's file"
    )
    every.add_argument(
        "--at-once",
        metavar="N",
        type=positive,
        default=1,
        help="jobs at a time (default 1: in turn)",
    )

    status = commands.add_parser(
        "status", help="where runs are: step, loss, speed, time left, checkpoint, restarts"
    )
    status.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder")
    status.add_argument(
        "--json", action="store_true", help="one JSON object a line instead of text"
    )

    sample = commands.add_parser(
        "sample", help="prompts to pictures; the same command again makes what is missing"
    )
    add_sampling(sample).add_argument(
        "--num",
        metavar="N",
        type=positive,
        help="so many pictures of a stage without text, of its classes in turn",
    )
    sample.add_argument(
        "--from",
        dest="start",
        metavar="STAGE",
        help="first stage to run, from the pictures in --out",
    )

    edit = commands.add_parser(
        "edit", help="a picture painted anew in a hole or in part, as a text says; again: missing"
    )
    add_sampling(edit)
    edit.add_argument(
        "--from", dest="start", metavar="STAGE", help="first stage to run, from the picture itself"
    )
    edit.add_argument(
        "--image", metavar="PATH", type=Path, required=True, help="a picture, or a folder of them"
    )
    edit.add_argument(
        "--mask", metavar="PATH", type=Path, help="white where to paint; or a folder of NAME.png"
    )
    edit.add_argument(
        "--strength",
        metavar="S",
        type=float,
        nargs="+",
        default=[],
        help="how much is painted anew, above 0 to 1, for each stage that runs or one for all (default: 1 with a mask, "
        "else 0.8)",
    )
    edit.add_argument(
        "--repaint-steps",
        metavar="N",
        type=positive,
        help="times that each step in a hole is made (RePaint)",
    )

    restore = commands.add_parser(
        "restore", help="pictures mended by an image-to-image stage; again: what is missing"
    )
    restore.add_argument(
        "path",
        metavar="STAGE",
        help="a stage folder, or a cascade folder of that stage and its text",
    )
    restore.add_argument(
        "--task",
        metavar="TASK",
        required=True,
        help="one that the stage was trained for, as inpainting",
    )
    restore.add_argument(
        "--image", metavar="PATH", type=Path, required=True, help="a picture, or a folder of them"
    )
    hole = restore.add_mutually_exclusive_group()
    hole.add_argument(
        "--mask", metavar="PATH", type=Path, help="white where to paint; or a folder of NAME.png"
    )
    hole.add_argument(
        "--extend",
        metavar="N",
        type=int,
        nargs=4,
        help="pixels to add at left, top, right and bottom",
    )
    restore.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="gets NAME.png, samples, spreads, manifest.jsonl",
    )
    restore.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the noise (default 0)"
    )
    restore.add_argument(
        "--steps", metavar="S", type=positive, help="network calls (default: as the stage says)"
    )
    restore.add_argument(
        "--samples", metavar="N", type=positive, default=1, help="of each picture, and their spread"
    )
    restore.add_argument(
        "--weights",
        metavar="W",
        type=float,
        nargs="+",
        help="blend the samples (default: the first)",
    )
    restore.add_argument(
        "--repaint-share",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="least certain, made again",
    )
    restore.add_argument(
        "--prompt", metavar="TEXT", default="", help="of all pictures, where the stage knows text"
    )

    explore = commands.add_parser(
        "explore", help="a look at a stage: five sheets of its samples and of what makes them"
    )
    explore.add_argument(
        "path", metavar="STAGE|CASCADE", help="the folder of a stage without text, or a cascade's"
    )
    explore.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="gets grid, path, steps, interpolation and noising.png",
    )
    explore.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the noise (default 0)"
    )
    explore.add_argument(
        "--num", metavar="N", type=positive, default=16, help="pictures in grid.png (default 16)"
    )
    explore.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        default=[],
        help="in turn; from the first to the second is interpolated",
    )
    explore.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        help="the picture that noising.png shows (default: the first of grid.png)",
    )
    return top


def add_sampling(command: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """What `sample` and `edit` both take; the ways to tell prompts."""
    command.add_argument(
        "path", metavar="CASCADE|STAGE", help="a cascade folder, or that of a stage without text"
    )
    text = command.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        default=[],
        help="one picture each; or names of classes",
    )
    text.add_argument(
        "--prompts", metavar="FILE", type=Path, help="one prompt a line; empty lines do not count"
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="gets 00000.png, STAGE/00000.png, manifest.jsonl",
    )
    command.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the noise (default 0)"
    )
    for name, kind, what in (
        ("steps", int, "network calls, for each stage that runs or one for all"),
        (
            "guidance",
            float,
            "weight of the text, for each stage that runs or one for all; 1 is no guidance",
        ),
        (
            "aug_level",
            float,
            "noise on the low resolution, for each super-resolution stage that runs or one for all",
        ),
    ):
        command.add_argument(
            f"--{name}", metavar=name[0].upper(), type=kind, nargs="+", default=[], help=what
        )
    command.add_argument("--to", dest="stop", metavar="STAGE", help="last stage to run")
    return text
