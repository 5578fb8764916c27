"""How long an LLM's requests are: a joint sample of prompt and output lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Equally likely requests: [sample] input and output tokens, read-only."""

    input_tokens: Floats
    output_tokens: Floats

    def __post_init__(self) -> None:
        if not len(self.input_tokens) == len(self.output_tokens) > 0:
            raise ValueError(
                "lengths need one input and output for each of 1.. requests"
            )
        for array in (self.input_tokens, self.output_tokens):
            array.setflags(write=False)

    @classmethod
    def fixed(cls, input_tokens: float, output_tokens: float) -> Lengths:
        """All requests alike: what means alone can say."""
        return cls(np.array([float(input_tokens)]), np.array([float(output_tokens)]))

    @classmethod
    def of_requests(
        cls, inputs: ArrayLike, outputs: ArrayLike, at_most: int = 512
    ) -> Lengths:
        """The requests themselves, thinned evenly along their prompts (O(n log n))."""
        prompts = np.asarray(inputs, dtype=np.float64)
        answers = np.asarray(outputs, dtype=np.float64)
        if len(prompts) > at_most:
            order = np.lexsort((answers, prompts))
            middle = (np.arange(at_most) + 0.5) * len(prompts) / at_most
            kept = order[middle.astype(np.int64)]
            prompts, answers = prompts[kept], answers[kept]
        return cls(prompts.copy(), answers.copy())

    def scaled(self, mean_input: float, mean_output: float) -> Lengths:
        """The same shape with other means."""
        return Lengths(
            self.input_tokens * (mean_input / max(self.mean_input, 1e-9)),
            self.output_tokens * (mean_output / max(self.mean_output, 1e-9)),
        )

    @property
    def mean_input(self) -> float:
        return float(self.input_tokens.mean())

    @property
    def mean_output(self) -> float:
        return float(self.output_tokens.mean())
