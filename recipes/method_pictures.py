"""``python -m recipes.method_pictures``: the pictures of docs/methods, one for every method that can be drawn.

All methods of a family are drawn on the same held-out picture, clip or chat, by the built-in model of the family.
:data:`REASONS` says why a method has no picture. ``--only NAME ...`` draws some methods again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import vtr
from recipes import mask_pictures
from recipes import method_drawings as drawings
from recipes.method_text import methods
from vtr.core.method import Method

FOLDER = Path(__file__).parents[1] / "docs/methods/pictures"
LAYERS = (1, 2, 3)  # of the built-in ViT, for methods that cut several times
KEPT = 36  # of 144 tokens
PREFILL: dict[str, Any] = {"block": 16, "last_rows": 1, "backend": "sdpa"}
DIFFUSION: dict[str, Any] = {"block": mask_pictures.BLOCK, "dense_steps": 2, "backend": "sdpa"}

REASONS: Mapping[str, str] = {
    "avit": "A model has to be trained under it: in one that was not, nearly nothing halts.",
    "damro": "It drops nothing: a second run that sees the outlier tokens alone corrects the next word.",
    "dtop": "Its heads have to be trained for a segmenter, and no segmenter is built in.",
    "expedit": "It clusters the windows of SAM, and no model with windows is built in.",
    "pixelprune": "It acts in front of the towers of Qwen's models, of which none is built in.",
    "searched-tile": "It has another window in every step, layer and head; SlidingTile shows one.",
    "sparsevit": "It skips windows of Swin, and no model with windows is built in.",
    "vhr": "It scales the outputs of heads; no token is dropped, and no attention is changed.",
}
"""Why a method has no picture."""


@dataclass(frozen=True)
class Scene:
    """A fixed input of a built-in model, on which all methods of a family are drawn.

    Attributes:
        model: the model's name.
        caption: text below the picture.
        draw: draws a method.
    """

    model: str
    caption: str
    draw: Callable[[Any], Any]


PICTURE = Scene(
    "digits-vit",
    "A held-out picture of the built-in ViT, and the tokens behind the last cuts. Dark tokens are dropped, "
    "coloured ones merged, hatched ones frozen.",
    drawings.picture,
)
PAIRS = Scene(
    "digits-vit",
    "The pairs of tokens that are computed in one block of the built-in ViT: queries down, keys across, darker "
    "if more heads compute the pair.",
    drawings.pairs,
)
QUESTION = Scene(
    "digits-llava",
    "A held-out picture with a question, and the visual tokens of the built-in LLaVA behind the last cuts. Dark tokens are dropped, coloured ones merged.",
    drawings.question,
)
CLIP = Scene(
    "digits-video",
    "Eight frames of a clip, and the visual tokens of the built-in video model behind the last cut. Dark tokens "
    "are dropped, coloured ones merged, over frames too.",
    drawings.clip,
)
PREFILLED = Scene(
    "digits-long",
    "The mask in two layers of the built-in model for long videos, mean over heads, for 64 frames and a "
    "question: queries down, keys across. Strips show frames in grey and text in orange.",
    drawings.prefilled,
)
EDITED = Scene(
    "digits-long",
    "Attention of the prompt's last row to the tokens of 64 frames, before and behind the edit, in the head that "
    "changes most.",
    drawings.edited,
)
READ = Scene(
    "digits-long",
    "The keys that decoding steps of the built-in model for long videos read: one line for each step and layer, "
    "darker if more heads read the key. White keys are not read.",
    drawings.read,
)
CACHED = Scene(
    "digits-chat",
    "What the KV cache holds behind a prompt with twelve pictures: one line for each KV head of each layer, one "
    "column for each token. Dark entries are held, lighter ones with fewer bits, white ones are gone. The strip "
    "shows pictures in grey and text in orange.",
    drawings.cached,
)
DETECTED = Scene(
    "digits-detr",
    "A held-out picture of the built-in detector, and the tokens that its encoder computes in the last layer, on "
    "each level. Dark tokens are left as they are.",
    drawings.detected,
)
MASK = Scene(
    "digits-wan",
    "The pairs of blocks that are computed in one layer of the built-in video generator, in the middle of a run: "
    "queries down, keys across, lines between the frames.",
    lambda method: mask_pictures.picture(mask_pictures.live(method)),
)
CRITICAL = Scene(
    MASK.model,
    "The critical blocks of one layer of the built-in video generator, which are those of "
    "[TopKSparse](topk-sparse.md), in the middle of a run: queries down, keys across, lines between the frames.",
    MASK.draw,
)
GROUPS = Scene(
    "digits-wan",
    "The tokens of the five frames that the built-in video generator draws, in one block in the last step. Tokens of one "
    "colour are computed as one; dark ones take over another one's result.",
    drawings.groups,
)


@cache
def scenes() -> Mapping[str, tuple[Scene, Method]]:
    """Return the scene and the settings of every method that is drawn, by the names of the methods."""
    from vtr.evaluate import chats, digits, prefill

    found: dict[str, tuple[Scene, Method]] = {}

    def show(scene: Scene, *methods: Method) -> None:
        for method in methods:
            found[method.name] = scene, method

    show(
        PICTURE,
        vtr.AdaptiveSparseViT(weights=digits.ADAPTIVE_WEIGHTS),
        vtr.ALGM(threshold=0.9),
        vtr.ATS(keep=KEPT, layers=LAYERS),
        vtr.CLSAttention(keep=KEPT, layers=(1,)),
        vtr.DiffRate(keep=KEPT),
        vtr.Downsample(keep=KEPT),
        vtr.DynamicViT(keep=(0.25, 0.15, 0.1), weights=digits.DYNAMIC_WEIGHTS),
        vtr.EViT(keep=0.5, layers=LAYERS),
        vtr.EvoViT(keep=0.25),
        vtr.FlowCut(keep=KEPT, end=3),
        vtr.PPT(keep=KEPT, layers=LAYERS),
        vtr.Random(keep=KEPT, layers=(1,), seed=0),
        vtr.SpAtten(keep=KEPT),
        vtr.ToFe(keep=(0.5, 0.35, 0.25)),
        vtr.ToFu(keep=KEPT),
        vtr.ToMe(keep=KEPT),
        vtr.TPS(keep=0.5, layers=LAYERS),
    )
    show(PAIRS, vtr.Sparsifiner(weights="digits-sparsifiner"))
    falling = (96, 60, KEPT)
    show(
        QUESTION,
        vtr.CDPruner(keep=KEPT),
        vtr.DART(keep=KEPT),
        vtr.Debias(vtr.FastV(keep=KEPT, layer=2)),
        vtr.DivPrune(keep=KEPT),
        vtr.FasterVLM(keep=KEPT),
        vtr.FastV(keep=KEPT, layer=2),
        vtr.HiRED(keep=KEPT),
        vtr.MustDrop(layers=(1, 2), window=2, alike=0.8, overall=0.003, single=0.01, key=0.1),
        vtr.PyramidDrop(keep=falling),
        vtr.SparseVLM(keep=falling),
        vtr.VFlowOpt(keep=KEPT),
        vtr.VisionZip(keep=KEPT),
        vtr.VisPruner(keep=KEPT),
        vtr.VMTC(keep=KEPT),
        vtr.VTCCLS(keep=KEPT, window=3),
    )
    show(
        CLIP,
        vtr.DyCoke(keep=1 / 3, kv=None),
        vtr.EVS(),
        vtr.FastVID(),
        vtr.FrameFusion(),
        vtr.HoliTom(inner=None),
        vtr.PruneVid(keep=0.25),
        vtr.STTM(),
        vtr.UniformFrames(),
        vtr.VidCom2(),
        vtr.VideoToMe(),
    )
    for settings in prefill.methods().values():
        cls = type(settings[0])
        show(EDITED if prefill.is_edit(cls) else PREFILLED, settings[min(1, len(settings) - 1)])
    show(
        READ,
        vtr.DELTA(keys=64, recent=16, page=16),
        vtr.RecycledAttention(keys=64, stride=4),
        vtr.TidalDecode(keys=64),
    )
    names = methods()
    for name, held in chats.methods().items():
        if name in names:
            quarter = [m for m in held if getattr(m, "keep", None) == 0.25]
            show(CACHED, (quarter or held)[0])
    show(PREFILLED, vtr.ZipVL(tau=0.6, skip_rows=False, **PREFILL))  # skipped rows would look dense
    show(
        DETECTED,
        vtr.Objectness(keep=0.1, layers=(0,)),
        vtr.SparseDETR(keep=0.1, weights="digits-sparse-detr"),
        vtr.FocusDETR(keep=0.1, weights="digits-focus-detr", objects=0),
    )
    show(
        MASK,
        *mask_pictures.methods().values(),
        vtr.OwnFrame(**DIFFUSION),
        vtr.RandomSparse(density=0.25, **DIFFUSION),
        vtr.Rettention(density=0.25, residual=False, **DIFFUSION),
    )
    found["sla"] = CRITICAL, vtr.TopKSparse(density=0.25, **DIFFUSION)
    show(GROUPS, vtr.OptiPrune(), vtr.SiTo(), vtr.ToMA(window=(1, 4, 4)), vtr.ToMeSD())
    return {name: found[name] for name in sorted(found) if name not in REASONS}


def write(folder: Path = FOLDER, only: tuple[str, ...] = ()) -> list[Path]:
    """Write the pictures, as WebP; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (scene, method) in scenes().items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        files.append(folder / f"{name}.webp")
        print(files[-1], flush=True)
        scene.draw(method).convert("RGB").save(files[-1], quality=70, method=6)
    return files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.method_pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    options = parser.parse_args(arguments)
    write(options.out, tuple(options.only))


if __name__ == "__main__":
    main()
