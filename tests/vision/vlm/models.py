"""The tiny vision-language models of :mod:`vtr.testing`, for tests."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

# Newer versions of generate repeat the pictures of a sample together. Older ones repeat each picture by itself, so
# that beams of a sample with two pictures see one of them twice, without any method as well.
repeats_samples = pytest.mark.skipif(
    not hasattr(transformers.GenerationMixin, "_expand_multimodal_outputs"),
    reason="generate of this transformers repeats pictures one by one, whatever sample they are of",
)

from vtr.testing.models.vlms import *  # noqa: E402, F403
