"""One file per published method, listed in :data:`TABLE`.

Authors of methods import :mod:`vtr.methods.base`. Nothing is loaded before it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

TABLE: dict[str, str] = {
    "A2SF": "a2sf",
    "ACT": "act",
    "ALGM": "algm",
    "ATS": "ats",
    "AViT": "avit",
    "AdaSpa": "adaspa",
    "AdaptiveSparseViT": "adaptive_sparse_vit",
    "AnchorAttention": "anchor_attention",
    "CDPruner": "cdpruner",
    "CLSAttention": "cls_attention",
    "CMAI": "cmai",
    "D2O": "d2o",
    "DAM": "dam",
    "DAMRO": "damro",
    "DART": "dart",
    "DELTA": "delta",
    "DHSA": "dhsa",
    "DToP": "dtop",
    "Debias": "debias",
    "DiffRate": "diffrate",
    "DivPrune": "divprune",
    "Downsample": "downsample",
    "DraftAttention": "draft_attention",
    "DyCoke": "dycoke",
    "DynamicViT": "dynamicvit",
    "EMS": "ems",
    "EVS": "evs",
    "EViT": "evit",
    "EvoViT": "evo_vit",
    "Expedit": "expedit",
    "FastV": "fastv",
    "FastVID": "fastvid",
    "FasterVLM": "fastervlm",
    "FlexPrefill": "flexprefill",
    "FlowCut": "flowcut",
    "FocusDETR": "focus_detr",
    "FrameFusion": "framefusion",
    "GUIKV": "guikv",
    "H2O": "h2o",
    "HiP": "hip",
    "HiRED": "hired",
    "HoliTom": "holitom",
    "ImageBlocks": "image_blocks",
    "Jenga": "jenga",
    "LiteAttention": "liteattention",
    "LocalWindow": "prefill_baselines",
    "MInference": "minference",
    "MustDrop": "mustdrop",
    "NeighborhoodAttention": "neighborhood",
    "Objectness": "objectness",
    "OptiPrune": "sito",
    "OwnFrame": "random_sparse",
    "PPT": "ppt",
    "PixelPrune": "pixelprune",
    "ProxyAttn": "proxyattn",
    "PruneVid": "prunevid",
    "PyramidDrop": "pyramiddrop",
    "RadialAttention": "radial",
    "Random": "random",
    "RandomBlocks": "prefill_baselines",
    "RandomKV": "kv_baselines",
    "RandomSparse": "random_sparse",
    "RecentKV": "kv_baselines",
    "RectifiedSparse": "rectified",
    "RecycledAttention": "recycled_attention",
    "Rettention": "rettention",
    "SALE": "sale",
    "SLA": "sla",
    "STTM": "sttm",
    "SVG2": "svg2",
    "Scissorhands": "scissorhands",
    "SearchedTile": "searched_tile",
    "SiTo": "sito",
    "SlidingTile": "sliding_tile",
    "SnapKV": "snapkv",
    "SpAtten": "spatten",
    "SpargeAttn": "spargeattn",
    "SparseDETR": "sparse_detr",
    "SparseVLM": "sparsevlm",
    "SparseViT": "sparsevit",
    "Sparsifiner": "sparsifiner",
    "StaircaseKV": "staircase",
    "StreamingLLM": "streaming_llm",
    "TPS": "tps",
    "TidalDecode": "tidaldecode",
    "ToDo": "todo",
    "ToFe": "tofe",
    "ToFu": "tofu",
    "ToMA": "toma",
    "ToMe": "tome",
    "ToMeSD": "tomesd",
    "TopKSparse": "topk_sparse",
    "UniformFrames": "uniform_frames",
    "VAR": "var",
    "VASparse": "vasparse",
    "VFlowOpt": "vflowopt",
    "VHR": "vhr",
    "VMTC": "vmtc",
    "VSA": "vsa",
    "VTCCLS": "vtc_cls",
    "VidCom2": "vidcom2",
    "VideoToMe": "video_tome",
    "VisPruner": "vispruner",
    "VisionZip": "visionzip",
    "XAttention": "xattention",
    "XAttentionDiT": "xattention_dit",
    "ZipCache": "zipcache",
    "ZipVL": "zipvl",
    "ZipVLCache": "zipvl_cache",
}
"""The class of every method, and its module in this package.

The one list of methods: public names, command line, tables of the documentation and tests derive from it.
"""

__all__ = ["TABLE", "load", *TABLE]


def load() -> None:
    """Import every module of :data:`TABLE`, which registers the methods."""
    for name in TABLE:
        getattr(importlib.import_module(f"vtr.methods.{TABLE[name]}"), name)


def __getattr__(name: str) -> Any:
    if name not in TABLE:
        raise AttributeError(f"module 'vtr.methods' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vtr.methods.{TABLE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *TABLE])
