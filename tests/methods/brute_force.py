"""The module of each method that acts inside attention whose ``brute_force`` reads the paper in loops."""

from __future__ import annotations

BRUTE_FORCE = {
    "anchor-attention": "tests.methods.test_anchor_attention",
    "dam": "tests.methods.test_dam",
    "dhsa": "tests.methods.test_dhsa",
    "flexprefill": "tests.methods.test_flexprefill",
    "hip": "tests.methods.test_hip",
    "image-blocks": "tests.methods.test_image_blocks",
    "local-window": "tests.methods.test_prefill_baselines",
    "minference": "tests.methods.test_minference",
    "proxyattn": "tests.methods.test_proxyattn",
    "random-blocks": "tests.methods.test_prefill_baselines",
    "sale": "tests.methods.test_sale",
    "xattention": "tests.methods.test_xattention",
    "zipvl": "tests.methods.test_zipvl",
}
