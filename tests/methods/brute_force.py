"""The module of each method that acts inside attention whose ``brute_force`` reads the paper in loops."""

from __future__ import annotations

BRUTE_FORCE = {
    "act": "tests.methods.test_act",
    "anchor-attention": "tests.methods.test_anchor_attention",
    "cmai": "tests.methods.test_cmai",
    "dam": "tests.methods.test_dam",
    "delta": "tests.methods.test_delta",
    "dhsa": "tests.methods.test_dhsa",
    "flexprefill": "tests.methods.test_flexprefill",
    "hip": "tests.methods.test_hip",
    "image-blocks": "tests.methods.test_image_blocks",
    "local-window": "tests.methods.test_prefill_baselines",
    "minference": "tests.methods.test_minference",
    "proxyattn": "tests.methods.test_proxyattn",
    "random-blocks": "tests.methods.test_prefill_baselines",
    "recycled-attention": "tests.methods.test_recycled_attention",
    "sale": "tests.methods.test_sale",
    "tidaldecode": "tests.methods.test_tidaldecode",
    "var": "tests.methods.test_var",
    "vhr": "tests.methods.test_vhr",
    "xattention": "tests.methods.test_xattention",
    "zipvl": "tests.methods.test_zipvl",
}
