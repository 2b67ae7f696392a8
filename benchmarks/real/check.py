"""Compare mapped weights with the runtime that they were published with."""

from __future__ import annotations

import torch
import weights  # beside this script

ALLOWED = 1e-4


@torch.inference_mode()
def compare() -> dict[str, float]:
    """Largest differences of outputs from the packages' own runtime, on random pictures.

    Raises:
        ValueError: one is above 1e-4.
    """
    found = {"saliency": _saliency(), "reading": _reading()}
    for name, difference in found.items():
        if not difference <= ALLOWED:
            raise ValueError(
                f"{name}: the mapped weights differ by {difference} from the published runtime"
            )
    return found


def _saliency() -> float:
    import onnxruntime

    tensors = weights.saliency_tensors()
    pictures = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(
        str(weights.saliency_file()), providers=["CPUExecutionProvider"]
    )
    (published,) = session.run(None, {"input_image": pictures.numpy()})
    decoder = weights.saliency_decoder(tensors)
    ours = decoder(weights.dinov2_timm(tensors).forward_features(pictures)[:, 1:])
    theirs = decoder(weights.dinov2(tensors)(pictures).last_hidden_state[:, 1:])
    return max(float((x - torch.from_numpy(published)).abs().max()) for x in (ours, theirs))


def _reading() -> float:
    with weights.importable(weights.OCR[0]):
        from latex_ocr_torch.model import ModelConfig, build_model
    tensors = weights.ocr_tensors()
    published = build_model(ModelConfig(**weights.ocr_config())).eval()
    published.load_state_dict(tensors)
    pictures = torch.rand(2, 1, 128, 512, generator=torch.Generator().manual_seed(0))
    ours = weights.ocr_encoder(tensors).forward_features(pictures)
    return float((ours - published.encode(pictures)).abs().max())
