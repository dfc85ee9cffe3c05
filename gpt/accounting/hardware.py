"""Peak rates, memory and links of accelerators, by the name that the device reports. Imports no torch.

All rates are dense: published figures twice as high assume 2:4 sparsity. A device outside the table has no known
figures, and no utilization is reported for it. A guessed peak would give a wrong utilization.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpt.config import Precision

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Accelerator:
    """Figures of one device from its vendor; None if unsupported or absent."""

    name: str
    """Regular expression that matches the whole of ``torch.cuda.get_device_name()``."""
    bf16: float | None
    """Dense peak in bf16, TFLOP/s."""
    fp32: float | None
    """Dense peak of the ordinary fp32 units, TFLOP/s; TF32 is separate."""
    memory_gb: float
    """Memory in 10^9 bytes. A size in a device's name takes precedence."""
    link_gb_per_s: float
    """Bandwidth to other devices of its node, one direction, 10^9 bytes a second: NVLink, Infinity Fabric, or PCIe."""
    network_gb_per_s: float | None
    """Its share of the network adapters in the vendor's own system, 10^9 bytes a second; None without adapters."""
    tf32: float | None = None
    """Dense peak, TFLOP/s, of fp32 products whose factors are rounded to TF32 (10 bits of mantissa)."""
    fp16: float | None = None
    """Dense peak, TFLOP/s, of fp16 accumulated in fp32; None if it equals that of bf16."""
    has_float8: bool = False
    """True if the matrix units multiply 8-bit floating point numbers in torch."""

    @property
    def half(self) -> Precision:
        """16-bit precision of its matrix units: fp16 if they do not support bf16."""
        return Precision.fp16 if self.bf16 is None else Precision.bf16

    def peak(self, precision: Precision, tf32: bool = False) -> float | None:
        """Return the dense peak in a precision, TFLOP/s; None if unknown. ``tf32`` allows TF32 for fp32 if
        supported."""
        if precision is Precision.bf16:
            return self.bf16
        if precision is Precision.fp16:
            return self.bf16 if self.fp16 is None else self.fp16
        return self.tf32 if tf32 and self.tf32 is not None else self.fp32


# Whole names are matched. "NVIDIA H20", "NVIDIA A10G", "NVIDIA L40", "NVIDIA H200 NVL", a laptop's chip of the same
# number, and a slice ("NVIDIA A100-SXM4-40GB MIG 1g.5gb") are other devices. Links are half of the data sheets'
# figures, which count both directions.
ACCELERATORS = (
    # Data sheets of the vendors. NVIDIA V100 (2020) and T4 (2019); their tensor cores know fp16, neither bf16 nor TF32.
    # DGX-1: four adapters of 100 Gbit/s for eight GPUs.
    Accelerator(r"(Tesla|NVIDIA) V100-SXM2-(16|32)GB", None, 15.7, 16, 150, 6.25, fp16=125),
    Accelerator(r"(Tesla|NVIDIA) V100-PCIE-(16|32)GB", None, 14, 16, 16, None, fp16=112),
    Accelerator(r"(Tesla|NVIDIA) T4", None, 8.1, 16, 16, None, fp16=65),
    # NVIDIA A100 (2021): the same peaks for SXM4 and PCIe. DGX A100: 200 Gbit/s for each GPU. From this generation on,
    # TF32 has half the peak of bf16.
    Accelerator(r"(NVIDIA )?A100-SXM4-(40|80)GB", 312, 19.5, 40, 300, 25, tf32=156),
    Accelerator(r"(NVIDIA )?A100-PCI[Ee]-(40|80)GB", 312, 19.5, 40, 32, None, tf32=156),
    Accelerator(r"NVIDIA A100 80GB PCIe", 312, 19.5, 80, 32, None, tf32=156),
    # NVIDIA H100 (2023 and 2024): 1979, 1513 and 1671 TFLOP/s with sparsity, in TF32 989, 756 and 835. DGX H100: 400
    # Gbit/s for each GPU. A bridge joins only two of the PCIe cards.
    Accelerator(r"NVIDIA H100 80GB HBM3", 989, 67, 80, 450, 50, tf32=494.5, has_float8=True),
    Accelerator(r"NVIDIA H100 PCIe", 756, 51, 80, 64, None, tf32=378, has_float8=True),
    Accelerator(r"NVIDIA H100 NVL", 835, 60, 94, 64, None, tf32=417.5, has_float8=True),
    # NVIDIA H200 (2024), the SXM form; TF32 989 with sparsity.
    Accelerator(r"NVIDIA H200", 989, 67, 141, 450, 50, tf32=494.5, has_float8=True),
    # NVIDIA HGX B200 and GB200 NVL72 (2024): 4500 and, for each of the two GPUs, 5000 with sparsity; TF32 half of it.
    Accelerator(r"NVIDIA B200", 2250, None, 180, 900, 50, tf32=1125, has_float8=True),
    Accelerator(r"NVIDIA GB200", 2500, None, 186, 900, 50, tf32=1250, has_float8=True),
    # NVIDIA L40S (2023): 733 with sparsity, in TF32 366; the data sheet also gives the dense figures.
    Accelerator(r"NVIDIA L40S", 362, 91.6, 48, 32, None, tf32=183, has_float8=True),
    # NVIDIA A10 (2021): 250 with sparsity, in TF32 125; the A10G of a cloud is another, slower device.
    Accelerator(r"NVIDIA A10", 125, 31.2, 24, 32, None, tf32=62.5),
    # AMD Instinct MI300X (2023): seven links of 128 GB/s. Its TF32 is off in torch, unless HIPBLASLT_ALLOW_TF32 is set.
    Accelerator(r"AMD Instinct MI300X( OAM)?", 1307, 163.4, 192, 448, 50, has_float8=True),
    # NVIDIA white papers of the GA102 (appendix A) and AD102 architectures: products accumulated in fp32. The RTX 3080
    # of 12 GB is slightly faster, and has the same name as that of 10 GB. The GeForce cards of both do bf16 at twice,
    # TF32 at once the rate of fp32; the RTX A6000 at four and two times.
    Accelerator(r"(NVIDIA )?GeForce RTX 3070", 40.6, 20.3, 8, 32, None, tf32=20.3),
    Accelerator(r"(NVIDIA )?GeForce RTX 3080", 59.5, 29.8, 10, 32, None, tf32=29.8),
    Accelerator(r"(NVIDIA )?GeForce RTX 3090", 71, 35.6, 24, 32, None, tf32=35.6),
    Accelerator(r"NVIDIA RTX A6000", 154.8, 38.7, 48, 32, None, tf32=77.4),
    # Devices newer than the papers: NVIDIA's number of cores times the boost clock times two operations. NVIDIA's
    # Tensor TFLOP/s (RTX 30) and TOPS (RTX 40) agree: they are four and eight times this peak. The RTX 4060 Ti comes
    # with two sizes of memory; the table has the smaller. Left out: the RTX 3050, two devices under one name, and the
    # RTX 3070 Ti, 3080 Ti and 4070 SUPER, whose clocks have not been verified.
    Accelerator(r"NVIDIA GeForce RTX 3060", 25.5, 12.7, 12, 32, None, tf32=12.7),
    Accelerator(r"NVIDIA GeForce RTX 3060 Ti", 32.4, 16.2, 8, 32, None, tf32=16.2),
    Accelerator(r"NVIDIA GeForce RTX 3090 Ti", 80, 40, 24, 32, None, tf32=40),
    Accelerator(r"NVIDIA GeForce RTX 4060", 30.2, 15.1, 8, 16, None, tf32=15.1, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4060 Ti", 44.1, 22.1, 8, 16, None, tf32=22.1, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4070", 58.3, 29.1, 12, 32, None, tf32=29.1, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4070 Ti", 80.2, 40.1, 12, 32, None, tf32=40.1, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4070 Ti SUPER", 88.2, 44.1, 16, 32, None, tf32=44.1, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4080 SUPER", 104.4, 52.2, 16, 32, None, tf32=52.2, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4090 D", 147.1, 73.5, 24, 32, None, tf32=73.5, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4080", 97.5, 48.7, 16, 32, None, tf32=48.7, has_float8=True),
    Accelerator(r"NVIDIA GeForce RTX 4090", 165, 82.6, 24, 32, None, tf32=82.6, has_float8=True),
)


KNOWN = (
    *("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB", "Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB", "Tesla T4"),
    *("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
    *("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA B200", "NVIDIA GB200"),
    *("NVIDIA L40S", "NVIDIA A10", "NVIDIA RTX A6000", "AMD Instinct MI300X"),
    *(f"NVIDIA GeForce RTX {card}" for card in ("3060", "3060 Ti", "3070", "3080", "3090", "3090 Ti")),
    *(f"NVIDIA GeForce RTX {card}" for card in ("4060", "4060 Ti", "4070", "4070 Ti", "4070 Ti SUPER")),
    *(f"NVIDIA GeForce RTX {card}" for card in ("4080", "4080 SUPER", "4090", "4090 D")),
)
"""Names of known devices, for suggestions and for short names."""
VENDOR_WORDS = ("nvidia", "tesla", "geforce", "rtx", "amd", "instinct", "oam")
"""Words of a name that do not distinguish devices."""
VARIANTS = {"ti", "super", "d"}
"""Words that make a name another device: an RTX 4080 is no RTX 4080 SUPER."""
SXM = "sxm"
"""Word for the SXM form of a module, as opposed to a PCIe card. The bare name of a chip with several forms means
SXM."""
IN_WORDS = {"NVIDIA H100 80GB HBM3": (SXM, "sxm5"), "NVIDIA H200": (SXM, "sxm5"), "NVIDIA B200": (SXM, "sxm6")}
"""Device -> words that short names use for it, but that its own name lacks."""


def find(device_name: str) -> Accelerator | None:
    """Return the figures of the device whose driver reports this name; None for an unknown device."""
    for known in ACCELERATORS:
        if re.fullmatch(known.name, device_name.strip()):
            return known
    return None


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case, a size as ``80gb``, without words that do not distinguish devices."""
    spelled = re.sub(r"\b(\d{2,3})(?: ?(?:gib|gb|g))?\b", r"\1gb", re.sub(r"[\s_-]+", " ", name.lower()))
    return [word for word in re.sub(r"\brtx(?=\d)", "rtx ", spelled).split() if word not in VENDOR_WORDS]


def expand(short_name: str) -> list[str]:
    """Return the devices that a short name such as ``H100``, ``A100-80GB`` or Slurm's ``nvidia_h100_80gb_hbm3`` means.

    The list has several devices if the name leaves the memory open, and is empty for an unknown name. The bare name of
    a chip means the SXM form. Names from drivers are matched whole, by ``find``.
    """
    if find(short_name):
        return [short_name]
    given, fitting = words_of(short_name), dict[str, set[str]]()
    for name in KNOWN:
        chip, *others = words_of(name)
        words = {chip, *others, f"{(memory_bytes(name) or 0) / GIGA:.0f}gb", *IN_WORDS.get(name, ())}
        words |= {SXM for word in others if word.startswith(SXM)}
        others_own = VARIANTS.intersection(others).difference(given)
        if chip in given and words.issuperset(given) and not others_own:
            fitting[name] = words
    return [name for name, words in fitting.items() if SXM in words] or [*fitting]


def peak_flops(device_name: str, precision: Precision, tf32: bool = False) -> float | None:
    """Return the dense peak of a device in FLOP/s; None if unknown.

    ``device_name`` is the result of ``torch.cuda.get_device_name()``. For ``fp32`` the peak is that of true fp32
    products, or with ``tf32`` that of TF32 if the device supports it.
    """
    known = find(device_name)
    tflops = None if known is None else known.peak(precision, tf32)
    return None if tflops is None else tflops * TERA


def memory_bytes(device_name: str) -> int | None:
    """Return the memory of a device in bytes; None if unknown."""
    known = find(device_name)
    if known is None:
        return None
    told = re.search(r"(\d+)GB", device_name)
    return int((float(told.group(1)) if told else known.memory_gb) * GIGA)
