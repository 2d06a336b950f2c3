"""Named inputs: what conditions a network has one name from the loader to the compiled function.

    text (B, L, D), text_mask (B, L)     a caption's embeddings, 1 at the tokens that are there
    label (B, K)                         one-hot class
    low_res (B, 3, H, W), low_res_noise (B, 3, H, W), low_res_logsnr (B,)
                                         what super-resolution enlarges, and its noise augmentation
    source (B, 3, H, W), mask (B, 1, H, W), task (B, K)
                                         what image-to-image restores, where, and its degradation
    dropout_seeds (B,)                   int32, in training with dropout

Everything on the host is a dict of arrays. A compiled function takes tensors by position, because
MindSpore compiles again for a dict that is rebuilt each step; `Inputs` holds the one order in which
they cross, and is the only place that knows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mindspore import Tensor

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The names of a function's inputs, in the order in which it takes them.

    Args:
        prompt: those that classifier-free guidance drops; rows of zeros stand for "no prompt".
        others: those that are always there.
        leading: those that come first, such as x, eps and logsnr in training.
    """

    prompt: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in order."""
        return (*self.leading, *self.prompt, *self.others)

    def flatten(self, arrays: Arrays) -> tuple[np.ndarray, ...]:
        """The arrays in order. ValueError, naming them, for inputs that are missing."""
        missing = [name for name in self.names if name not in arrays]
        if missing:
            raise ValueError(
                f"inputs: {', '.join(missing)} missing; this stage takes {', '.join(self.names)} "
                f"and was given {', '.join(arrays) or 'nothing'}"
            )

        return tuple(arrays[name] for name in self.names)

    def unpack(self, tensors: "Sequence[Tensor]") -> "dict[str, Tensor]":
        """The inverse of `flatten`, inside a compiled function, where it costs nothing."""
        named = {}
        for i, name in enumerate(self.names):
            named[name] = tensors[i]
        return named

    def drop_prompt(self, arrays: Arrays, keep_mask_B: np.ndarray) -> Arrays:
        """`arrays` with the prompt of each sample zeroed where `keep_mask_B`, float32 (B,), is 0:
        what a network learns to sample without a prompt from (Ho & Salimans, arXiv 2207.12598).
        """
        dropped = {}
        for name, array in arrays.items():
            if name in self.prompt:
                array = array * keep_mask_B.reshape((-1,) + (1,) * (array.ndim - 1))
            dropped[name] = array
        return dropped
