"""Peak rates, memory and links of accelerators, by the name the device gives itself.

Torch-free. All rates are dense: the figures twice as high that circulate assume 2:4 sparsity. A device that is not in
the table has no known figures, and no utilization is reported for it: a guess would be somebody else's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpt.config import Precision

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Accelerator:
    """Figures of one device, all from the vendor; None where unsupported or absent."""

    name: str
    """Regular expression for the whole of ``torch.cuda.get_device_name()``."""
    bf16: float | None
    """Dense peak, TFLOP/s."""
    fp32: float | None
    """Dense peak, TFLOP/s, of the ordinary fp32 units, not of TF32."""
    memory_gb: float
    """10^9 bytes; the size in a device's name takes precedence."""
    link_gb_per_s: float
    """Bandwidth to the others of its node, one direction, 10^9 bytes a second: NVLink, Infinity Fabric, else PCIe."""
    network_gb_per_s: float | None
    """Its share of the network adapters in the vendor's own system, 10^9 bytes a second; None where there is none."""
    tf32: float | None = None
    """Dense peak, TFLOP/s, of fp32 products whose factors are rounded to TF32 (10 bits of mantissa)."""
    fp16: float | None = None
    """Dense peak, TFLOP/s, accumulated in fp32, where it is not that of bf16."""
    has_float8: bool = False
    """True where the matrix units multiply 8-bit floating point numbers, as torch uses them."""

    @property
    def half(self) -> Precision:
        """Precision of 16 bits that its matrix units take: fp16 where they are too old for bf16."""
        return Precision.fp16 if self.bf16 is None else Precision.bf16

    def peak(self, precision: Precision, tf32: bool = False) -> float | None:
        """Return the dense peak in a precision, TFLOP/s; ``tf32`` allows TF32 in fp32, where the device has it."""
        if precision is Precision.bf16:
            return self.bf16
        if precision is Precision.fp16:
            return self.bf16 if self.fp16 is None else self.fp16
        return self.tf32 if tf32 and self.tf32 is not None else self.fp32


# Names are matched whole. "NVIDIA H20", "NVIDIA A10G", "NVIDIA L40", "NVIDIA H200 NVL", a laptop's chip of the same
# number, and a slice of a device ("NVIDIA A100-SXM4-40GB MIG 1g.5gb") are other devices. Links are half of what data
# sheets give, which is both directions together.
ACCELERATORS = (
    # Data sheets of the vendors. NVIDIA V100 (2020) and T4 (2019); their tensor cores know fp16, neither bf16 nor TF32.
    # DGX-1: four adapters of 100 Gbit/s for eight GPUs.
    Accelerator(r"(Tesla|NVIDIA) V100-SXM2-(16|32)GB", None, 15.7, 16, 150, 6.25, fp16=125),
    Accelerator(r"(Tesla|NVIDIA) V100-PCIE-(16|32)GB", None, 14, 16, 16, None, fp16=112),
    Accelerator(r"(Tesla|NVIDIA) T4", None, 8.1, 16, 16, None, fp16=65),
    # NVIDIA A100 (2021): the same peaks for SXM4 and PCIe. DGX A100: 200 Gbit/s for each GPU. Of this and the next
    # generations TF32 has half the peak of bf16.
    Accelerator(r"(NVIDIA )?A100-SXM4-(40|80)GB", 312, 19.5, 40, 300, 25, tf32=156),
    Accelerator(r"(NVIDIA )?A100-PCI[Ee]-(40|80)GB", 312, 19.5, 40, 32, None, tf32=156),
    Accelerator(r"NVIDIA A100 80GB PCIe", 312, 19.5, 80, 32, None, tf32=156),
    # NVIDIA H100 (2023 and 2024): 1979, 1513 and 1671 TFLOP/s with sparsity, in TF32 989, 756 and 835. DGX H100: 400
    # Gbit/s for each GPU. Of the PCIe forms only two are joined by a bridge.
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
    # NVIDIA white papers of the GA102 (appendix A) and AD102 architectures: products accumulated in fp32.
    # The RTX 3080 of 12 GB, a trifle faster, has the name of that of 10 GB.
    # The GeForce cards of both do bf16 at twice, TF32 at once the rate of fp32; the RTX A6000 at four and two times.
    Accelerator(r"(NVIDIA )?GeForce RTX 3070", 40.6, 20.3, 8, 32, None, tf32=20.3),
    Accelerator(r"(NVIDIA )?GeForce RTX 3080", 59.5, 29.8, 10, 32, None, tf32=29.8),
    Accelerator(r"(NVIDIA )?GeForce RTX 3090", 71, 35.6, 24, 32, None, tf32=35.6),
    Accelerator(r"NVIDIA RTX A6000", 154.8, 38.7, 48, 32, None, tf32=77.4),
    # Those that the papers came too early for: NVIDIA's numbers of cores times their boost clock, two operations each.
    # With that agree the Tensor TFLOP/s (RTX 30) and TOPS (RTX 40) that it advertises, four and eight times the peak.
    # Of the RTX 4060 Ti, which comes in two sizes, the smaller. Left out: the RTX 3050, two devices under one name, and
    # the RTX 3070 Ti, 3080 Ti and 4070 SUPER, whose clocks have not been verified.
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
"""Names of these devices, for suggestions and for short names."""
VENDOR_WORDS = ("nvidia", "tesla", "geforce", "rtx", "amd", "instinct", "oam")
"""Words of a name that do not tell devices apart."""
VARIANTS = {"ti", "super", "d"}
"""Words that make another device of a name: an RTX 4080 is no RTX 4080 SUPER."""
SXM = "sxm"
"""Word for the form of a module that is no PCIe card: with it a chip's bare name is meant, where it has more forms."""
IN_WORDS = {"NVIDIA H100 80GB HBM3": (SXM, "sxm5"), "NVIDIA H200": (SXM, "sxm5"), "NVIDIA B200": (SXM, "sxm6")}
"""Words by which devices are called and that their names lack."""


def find(device_name: str) -> Accelerator | None:
    """Find the device of this name; None where it is unknown."""
    for known in ACCELERATORS:
        if re.fullmatch(known.name, device_name.strip()):
            return known
    return None


def words_of(name: str) -> list[str]:
    """Split a name into its words in lower case, a size as ``80gb``, without those that tell no devices apart."""
    spelled = re.sub(r"\b(\d{2,3})(?: ?(?:gib|gb|g))?\b", r"\1gb", re.sub(r"[\s_-]+", " ", name.lower()))
    return [word for word in re.sub(r"\brtx(?=\d)", "rtx ", spelled).split() if word not in VENDOR_WORDS]


def expand(short_name: str) -> list[str]:
    """Return the devices that a short name such as ``H100``, ``A100-80GB`` or Slurm's ``nvidia_h100_80gb_hbm3`` means.

    More than one where it leaves the memory open, none where it is unknown. The bare name of a chip means the SXM form.
    Not for names that drivers report: those are matched whole.
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
    """Return the dense peak of a device in FLOP/s; None where it is unknown.

    ``device_name`` is what ``torch.cuda.get_device_name()`` gives. With ``fp32`` the peak is that of true fp32
    products, or with ``tf32`` that of TF32 where the device has it.
    """
    known = find(device_name)
    tflops = None if known is None else known.peak(precision, tf32)
    return None if tflops is None else tflops * TERA


def memory_bytes(device_name: str) -> int | None:
    """Return the memory of a device in bytes; None where it is unknown."""
    known = find(device_name)
    if known is None:
        return None
    told = re.search(r"(\d+)GB", device_name)
    return int((float(told.group(1)) if told else known.memory_gb) * GIGA)
