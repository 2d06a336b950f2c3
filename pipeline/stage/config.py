"""The configuration of a stage's run: each section stands beside what it configures."""

from dataclasses import dataclass, replace

from pipeline.config import ConfigError
from pipeline.data.config import DataConfig
from pipeline.diffusion.objective import DiffusionConfig
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.nn.unet import UNetConfig
from pipeline.text.encoder import TextConfig
from pipeline.text.prompts import ClassConfig, Conditioning
from pipeline.train.config import TrainConfig
from pipeline.train.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """Statistics of the data set's pixels, red, green and blue, in [-1, 1]: the network's input is
    (pixel - mean) / std.
    """

    mean: tuple[float, float, float]  # of red, green and blue
    std: tuple[float, float, float]  # likewise

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ConfigError(
                f"std: {list(self.std)} is not positive; `python -m tools.pixels` measures it"
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A run of one stage. Kinds of stage add fields of their own."""

    kind: str  # base, super_resolution or image_to_image
    run: str  # the run's folder
    seed: int = 0  # of all random draws of the run
    size: int  # side of the images that the stage generates, in pixels

    # What the prompt is, which `sample.guidance` weighs: a caption, a class, or none.
    conditioning: Conditioning = "text"
    text: TextConfig | None = None  # if conditioning is text
    classes: ClassConfig | None = None  # if conditioning is class

    pixels: PixelConfig | None = None  # None: not normalized
    diffusion: DiffusionConfig = DiffusionConfig()  # schedule, prediction and loss
    unet: UNetConfig  # the network
    data: DataConfig  # shards, filters and batch
    optimizer: OptimizerConfig = OptimizerConfig()  # and learning rate
    train: TrainConfig  # steps, precision, checkpoints
    sample: SamplerConfig = SamplerConfig()  # how the stage is sampled unless a call says otherwise

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: {self.seed} is not in [0, 2**63)")

        # In both directions: a section that nothing reads would hide a mistake.
        for name, conditioning in (("text", "text"), ("classes", "class")):
            section = getattr(self, name)
            if (section is not None) != (self.conditioning == conditioning):
                there = "a" if section else "no"
                raise ConfigError(
                    f"conditioning: {self.conditioning} and there is {there} section {name}; "
                    f"conditioning is {conditioning} if and only if there is one"
                )

        if self.conditioning != "text" and "cross" in self.unet.attention:
            raise ConfigError(
                "unet.attention: cross attends to the text, and conditioning is "
                f"{self.conditioning}; take self"
            )

        if self.conditioning == "none" and self.sample.guidance != 1:
            raise ConfigError(
                f"sample.guidance: {self.sample.guidance}, but conditioning none leaves nothing to "
                "weigh; leave it out"
            )

        if self.conditioning != "text":
            self._ignore_captions()

    def _ignore_captions(self) -> None:
        """Samples then need no caption, but a class where there are classes."""
        classes = self.classes.filter if self.classes else {}
        filters = replace(self.data.filter, fields=self.data.filter.fields | classes)
        # Frozen, but within `__post_init__` nobody has seen the old value.
        object.__setattr__(self, "data", replace(self.data, captions={}, filter=filters))

    @property
    def cond_drop_prob(self) -> float:
        """Share of training samples whose prompt is dropped."""
        section = self.text or self.classes
        return section.cond_drop_prob if section else 0.0
