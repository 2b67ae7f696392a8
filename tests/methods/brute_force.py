"""The module of each method that acts inside attention whose ``brute_force`` reads the paper in loops."""

from __future__ import annotations

BRUTE_FORCE = {
    "flexprefill": "tests.methods.test_flexprefill",
    "image-blocks": "tests.methods.test_image_blocks",
    "minference": "tests.methods.test_minference",
    "xattention": "tests.methods.test_xattention",
}
