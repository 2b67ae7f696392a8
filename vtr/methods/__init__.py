"""One file per published method. Importing this package registers them all.

``vtr.methods`` is also the function that lists them: the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

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
    "HoliTom",
    "NeighborhoodAttention",
    "OwnFrame",
    "PruneVid",
    "PyramidDrop",
    "RadialAttention",
    "Random",
    "RandomSparse",
    "RectifiedSparse",
    "Rettention",
    "SlidingTile",
    "SparseVLM",
    "ToFe",
    "ToMe",
    "ToMeSD",
    "UniformFrames",
    "VFlowOpt",
    "VideoToMe",
    "VisionZip",
]


class _Callable(ModuleType):
    """`vtr.methods()` is public, and importing the package of that name would hide it."""

    def __call__(self) -> list[Any]:
        from vtr.api import methods

        return methods()


sys.modules[__name__].__class__ = _Callable
