"""vtr: visual token reduction for vision and video models, behind one verb.

>>> with vtr.apply(model, vtr.ToMe(r=8)) as handle:
...     model(images)
>>> handle.trace.summary()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Resolved on first use, so that `import vtr` stays cheap.
_PUBLIC = {
    "apply": "vtr.api",
    "handles": "vtr.api",
    "Handle": "vtr.api",
    "methods": "vtr.api",
    "register_adapter": "vtr.core.adapters",
    "supported": "vtr.api",
    "create": "vtr.core.registry",
    "Method": "vtr.core.method",
    "Reduction": "vtr.core.method",
    "Stage": "vtr.core.method",
    "TokenMethod": "vtr.core.method",
    "register": "vtr.core.registry",
    "Site": "vtr.core.site",
    "ModelInfo": "vtr.core.site",
    "TokenMap": "vtr.core.tokens",
    "Trace": "vtr.core.trace",
    "Plan": "vtr.core.plan",
    "profile": "vtr.inspect.profile",
    "draw": "vtr.inspect.drawing",
    "VtrError": "vtr.errors",
    "MissingDependencyError": "vtr.errors",
    "UnsupportedModelError": "vtr.errors",
    "UnsupportedMethodError": "vtr.errors",
    "CLSAttention": "vtr.methods.cls_attention",
    "EViT": "vtr.methods.evit",
    "Debias": "vtr.methods.debias",
    "DivPrune": "vtr.methods.divprune",
    "Downsample": "vtr.methods.downsample",
    "FastV": "vtr.methods.fastv",
    "PyramidDrop": "vtr.methods.pyramiddrop",
    "SparseVLM": "vtr.methods.sparsevlm",
    "VFlowOpt": "vtr.methods.vflowopt",
    "VisionZip": "vtr.methods.visionzip",
    "VTCCLS": "vtr.methods.vtc_cls",
    "FlowCut": "vtr.methods.flowcut",
    "DyCoke": "vtr.methods.dycoke",
    "EVS": "vtr.methods.evs",
    "FastVID": "vtr.methods.fastvid",
    "FrameFusion": "vtr.methods.framefusion",
    "HoliTom": "vtr.methods.holitom",
    "UniformFrames": "vtr.methods.uniform_frames",
    "VideoToMe": "vtr.methods.video_tome",
    "PruneVid": "vtr.methods.prunevid",
    "RadialAttention": "vtr.methods.radial",
    "Random": "vtr.methods.random",
    "ToFe": "vtr.methods.tofe",
    "ToMe": "vtr.methods.tome",
    "ToMeSD": "vtr.methods.tomesd",
    "NeighborhoodAttention": "vtr.methods.neighborhood",
    "OwnFrame": "vtr.methods.random_sparse",
    "RandomSparse": "vtr.methods.random_sparse",
    "RectifiedSparse": "vtr.methods.rectified",
    "Rettention": "vtr.methods.rettention",
    "SlidingTile": "vtr.methods.sliding_tile",
}

_PACKAGES = frozenset({"evaluate", "kernels", "train", "video", "zoo"})

# Written out: a type checker reads nothing else.
__all__ = [
    "EVS",
    "VTCCLS",
    "CLSAttention",
    "Debias",
    "DivPrune",
    "Downsample",
    "DyCoke",
    "EViT",
    "FastV",
    "FastVID",
    "FlowCut",
    "FrameFusion",
    "Handle",
    "HoliTom",
    "Method",
    "MissingDependencyError",
    "ModelInfo",
    "NeighborhoodAttention",
    "OwnFrame",
    "Plan",
    "PruneVid",
    "PyramidDrop",
    "RadialAttention",
    "Random",
    "RandomSparse",
    "RectifiedSparse",
    "Reduction",
    "Rettention",
    "Site",
    "SlidingTile",
    "SparseVLM",
    "Stage",
    "ToFe",
    "ToMe",
    "ToMeSD",
    "TokenMap",
    "TokenMethod",
    "Trace",
    "UniformFrames",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VFlowOpt",
    "VideoToMe",
    "VisionZip",
    "VtrError",
    "__version__",
    "apply",
    "create",
    "draw",
    "handles",
    "methods",
    "profile",
    "register",
    "register_adapter",
    "supported",
]

if TYPE_CHECKING:
    from vtr import evaluate as evaluate
    from vtr import kernels as kernels
    from vtr import train as train
    from vtr import video as video
    from vtr import zoo as zoo
    from vtr.api import Handle, apply, handles, methods, supported
    from vtr.core.adapters import register_adapter
    from vtr.core.method import Method, Reduction, Stage, TokenMethod
    from vtr.core.plan import Plan
    from vtr.core.registry import create, register
    from vtr.core.site import ModelInfo, Site
    from vtr.core.tokens import TokenMap
    from vtr.core.trace import Trace
    from vtr.errors import (
        MissingDependencyError,
        UnsupportedMethodError,
        UnsupportedModelError,
        VtrError,
    )
    from vtr.inspect.drawing import draw
    from vtr.inspect.profile import profile
    from vtr.methods.cls_attention import CLSAttention
    from vtr.methods.debias import Debias
    from vtr.methods.divprune import DivPrune
    from vtr.methods.downsample import Downsample
    from vtr.methods.dycoke import DyCoke
    from vtr.methods.evit import EViT
    from vtr.methods.evs import EVS
    from vtr.methods.fastv import FastV
    from vtr.methods.fastvid import FastVID
    from vtr.methods.flowcut import FlowCut
    from vtr.methods.framefusion import FrameFusion
    from vtr.methods.holitom import HoliTom
    from vtr.methods.neighborhood import NeighborhoodAttention
    from vtr.methods.prunevid import PruneVid
    from vtr.methods.pyramiddrop import PyramidDrop
    from vtr.methods.radial import RadialAttention
    from vtr.methods.random import Random
    from vtr.methods.random_sparse import OwnFrame, RandomSparse
    from vtr.methods.rectified import RectifiedSparse
    from vtr.methods.rettention import Rettention
    from vtr.methods.sliding_tile import SlidingTile
    from vtr.methods.sparsevlm import SparseVLM
    from vtr.methods.tofe import ToFe
    from vtr.methods.tome import ToMe
    from vtr.methods.tomesd import ToMeSD
    from vtr.methods.uniform_frames import UniformFrames
    from vtr.methods.vflowopt import VFlowOpt
    from vtr.methods.video_tome import VideoToMe
    from vtr.methods.visionzip import VisionZip
    from vtr.methods.vtc_cls import VTCCLS


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"vtr.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vtr' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
