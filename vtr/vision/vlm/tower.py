"""Run methods inside the vision tower of a VLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtr.core.method import Stage
from vtr.core.wrapping import Entry, PerThread
from vtr.vision.encoders.blocks import EncoderRun
from vtr.vision.encoders.session import EncoderSession
from vtr.vision.vlm.sequence import mark

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping


class TowerSession(EncoderSession):
    """An encoder whose outputs have full length (transformers checks their number), and whose findings
    are passed to the language model: what methods stored, and which tokens are left."""

    owner: VLMWrapping
    capture = PerThread[Any]()

    def install(self) -> None:
        super().install()
        self.restoring = True

    def attention_stages(self) -> list[tuple[Entry, Stage]]:
        """None: the attention that methods compute in a VLM is the language model's."""
        return []

    def picture_flops(self, patches: int) -> int:
        """FLOPs of the layers for a picture of so many patches."""
        tokens = patches + self.prefix
        return sum(runner.flops(tokens, tokens) for runner in self.runners)

    def _trace(self, run: EncoderRun) -> None:
        capture = self.capture
        if capture is None:
            self.owner.begin(run.trace)
            return
        if capture.crops:
            raise RuntimeError(
                "the vision tower ran twice for one prompt: methods that look inside it need all crops in "
                "one call"
            )
        run.trace = self.owner.tracing
        run.trace.batch = capture.crops = run.batch
        run.crops = capture.numbers()
        if sum(run.crops) != run.batch:
            raise RuntimeError(
                f"the vision tower got {run.batch} crops or frames, but images of {run.crops} were "
                "expected: give the model pixels as its processor makes them"
            )

    def _finish(self, run: EncoderRun) -> None:
        capture = self.capture
        if capture is not None:
            capture.memory = dict(run.memory)
            if run.map is not None:
                capture.left = mark(run.map.kept, run.tokens)
                cutters = dict.fromkeys(s.method for s in run.trace.stages if s.site == "encoder")
                capture.cutters = tuple(cutters)
        super()._finish(run)
