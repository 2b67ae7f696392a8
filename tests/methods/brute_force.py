"""The module of each method that acts inside attention whose ``brute_force`` reads the paper in loops."""

from __future__ import annotations

BRUTE_FORCE = {
    "flexprefill": "tests.methods.test_flexprefill",
    "image-blocks": "tests.methods.test_image_blocks",
    "local-window": "tests.methods.test_prefill_baselines",
    "minference": "tests.methods.test_minference",
    "random-blocks": "tests.methods.test_prefill_baselines",
    "xattention": "tests.methods.test_xattention",
}
