"""Peaks by the names that drivers report, and what follows from them."""

from __future__ import annotations

import pytest

from gpt.accounting import Flops, expand, peak_flops, utilization
from gpt.config import Precision

KNOWN_BF16 = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L40S": 362,
    "AMD Instinct MI300X": 1307,
    "NVIDIA A10": 125,
    "NVIDIA RTX A6000": 154.8,
    "Tesla V100-SXM2-32GB": None,
}
KNOWN_FP32 = {
    "Tesla V100-SXM2-16GB": 15.7,
    "Tesla V100-SXM2-32GB": 15.7,
    "Tesla V100-PCIE-32GB": 14,
    "NVIDIA A100-SXM4-80GB": 19.5,
    "NVIDIA H100 80GB HBM3": 67,
    "NVIDIA B200": None,
}
UNKNOWN = (
    "NVIDIA L40",
    "NVIDIA A10G",
    "NVIDIA H20",
    "NVIDIA H200 NVL",
    "NVIDIA GH200 480GB",
    "NVIDIA B300 SXM6 AC",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "GRID A100-40C",
    "NVIDIA GeForce RTX 3050",
    "NVIDIA GeForce RTX 4070 SUPER",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "AMD Instinct MI300A",
    "AMD EPYC 9654 96-Core Processor",
    "cpu",
    "",
)


SHORT = {
    "H100": ["NVIDIA H100 80GB HBM3"],
    "nvidia_h100_80gb_hbm3": ["NVIDIA H100 80GB HBM3"],
    "H100-SXM5-80GB": ["NVIDIA H100 80GB HBM3"],
    "h100 pcie": ["NVIDIA H100 PCIe"],
    "H100-94GB": ["NVIDIA H100 NVL"],
    "A100": ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"],
    "a100-80": ["NVIDIA A100-SXM4-80GB"],
    "A100 80GB PCIe": ["NVIDIA A100 80GB PCIe"],
    "V100-32GB": ["Tesla V100-SXM2-32GB"],
    "rtx4090": ["NVIDIA GeForce RTX 4090"],
    "RTX 4080": ["NVIDIA GeForce RTX 4080"],
    "RTX 4070 Ti": ["NVIDIA GeForce RTX 4070 Ti"],
    "geforce_rtx_4070_ti_super": ["NVIDIA GeForce RTX 4070 Ti SUPER"],
    "RTX 3060 12GB": ["NVIDIA GeForce RTX 3060"],
    "RTX 3060 8GB": [],
    "mi300x": ["AMD Instinct MI300X"],
    "H20": [],
    "A100-64GB": [],
    "80GB": [],
    "": [],
}


@pytest.mark.parametrize(("name", "meant"), SHORT.items())
def test_short_names_mean_one_device_or_leave_the_memory_open(name: str, meant: list[str]) -> None:
    assert expand(name) == meant


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_device_that_is_not_in_the_table_has_no_short_name_and_borrows_no_peak(name: str) -> None:
    assert expand(name) == []
    assert [peak_flops(name, precision) for precision in Precision] == [None] * len(Precision)


KNOWN_TF32 = {
    "NVIDIA A100-SXM4-80GB": 156,
    "NVIDIA H100 80GB HBM3": 494.5,
    "NVIDIA H100 PCIe": 378,
    "NVIDIA H100 NVL": 417.5,
    "NVIDIA H200": 494.5,
    "NVIDIA L40S": 183,
    "NVIDIA GeForce RTX 3090": 35.6,
}
KNOWN_FP16 = {
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla T4": 65,
    "NVIDIA A100-SXM4-40GB": 312,
}


KNOWN = {
    (Precision.bf16, False): KNOWN_BF16,
    (Precision.fp32, False): KNOWN_FP32,
    (Precision.fp32, True): KNOWN_TF32,
    (Precision.fp16, False): KNOWN_FP16,
}


@pytest.mark.parametrize(
    ("asked", "name", "tflops"), [(asked, *row) for asked, known in KNOWN.items() for row in known.items()]
)
def test_known_peaks(asked: tuple[Precision, bool], name: str, tflops: float | None) -> None:
    assert peak_flops(name, *asked) == (tflops and tflops * 1e12), "none where device or vendor has none"


def test_tf32_changes_only_the_peak_of_fp32_where_the_device_has_it() -> None:
    for name in KNOWN_TF32:
        assert peak_flops(name, Precision.bf16, tf32=True) == peak_flops(name, Precision.bf16)
    for name in (name for name in KNOWN_FP16 if name.startswith("Tesla")):
        assert peak_flops(name, Precision.fp32, tf32=True) == peak_flops(name, Precision.fp32)


CORES_AND_BOOST_MHZ = {
    "3060": (3584, 1777),
    "3060 Ti": (4864, 1665),
    "3070": (5888, 1725),
    "3080": (8704, 1710),
    "3090": (10496, 1695),
    "3090 Ti": (10752, 1860),
    "4060": (3072, 2460),
    "4060 Ti": (4352, 2535),
    "4070": (5888, 2475),
    "4070 Ti": (7680, 2610),
    "4070 Ti SUPER": (8448, 2610),
    "4080": (9728, 2505),
    "4080 SUPER": (10240, 2550),
    "4090": (16384, 2520),
    "4090 D": (14592, 2520),
}
ADVERTISED = {"3060 Ti": 130, "3070": 163, "3080": 238, "3090": 285, "3090 Ti": 320, "4070 Ti": 641}
"""NVIDIA's Tensor TFLOP/s and, of the RTX 40, TOPS: sparse, accumulated in 16 bits, and the latter in 8 bits."""


@pytest.mark.parametrize("card", CORES_AND_BOOST_MHZ)
def test_the_peaks_of_cards_follow_from_their_cores_and_clocks(card: str) -> None:
    cores, boost_mhz = CORES_AND_BOOST_MHZ[card]
    name = f"NVIDIA GeForce RTX {card}"
    fp32, bf16 = peak_flops(name, Precision.fp32), peak_flops(name, Precision.bf16)
    assert fp32 == pytest.approx(2 * cores * boost_mhz * 1e6, rel=5e-3)
    assert bf16 == pytest.approx(4 * cores * boost_mhz * 1e6, rel=5e-3)
    if card in ADVERTISED:
        assert bf16 == pytest.approx(ADVERTISED[card] * 1e12 / (4 if card.startswith("3") else 8), rel=1e-2)


def test_utilization_of_a_published_run() -> None:
    # PaLM, appendix B: 540B on 6144 chips of 275 TFLOP/s, 238,300 tokens/s, 46.2 % with attention and 45.7 % without.
    # 118 layers, 48 heads 256 wide, 2048 tokens; the parameters beside attention are those of table 1.
    parameters, attention = 540.35e9, 12 * 118 * 48 * 256 * 2048
    flops = Flops(projections=0, attention=attention, ffn=int(6 * parameters), logits=0)
    used = utilization(flops, tokens_per_s=238_300 / 6144, peak_flops_per_s=275e12)
    assert used.mfu_palm == pytest.approx(0.462, abs=0.001)
    assert used.hfu == used.mfu_palm
    assert used.mfu_causal == pytest.approx((0.462 + 0.457) / 2, abs=0.001)
    assert used.tflops_per_s == pytest.approx(0.462 * 275, rel=0.002)


def test_no_utilization_without_a_peak() -> None:
    used = utilization(Flops(1, 2, 3, 4), tokens_per_s=1e12, peak_flops_per_s=None)
    assert (used.tflops_per_s, used.mfu_palm, used.mfu_causal, used.hfu) == (10.0, None, None, None)
