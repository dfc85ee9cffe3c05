"""Peak rates of accelerators, by the name the device gives itself.

Torch-free. All are dense: the figures twice as high that circulate assume 2:4 sparsity. A device that is not in the
table has no known peak, and no utilization is reported for it: a guess would be somebody else's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpt.config import Precision

TERA = 1e12


@dataclass(frozen=True)
class Peak:
    """Dense peaks of one device, TFLOP/s; None where it cannot or where the vendor gives no figure."""

    name: str
    """Regular expression for the whole of ``torch.cuda.get_device_name()``."""
    bf16: float | None
    fp32: float | None
    """Of the ordinary fp32 units, not of TF32, which is another number format and off by default in torch."""


# Names are matched whole. "NVIDIA H20", "NVIDIA A10G", "NVIDIA L40", "NVIDIA H200 NVL", a laptop's chip of the same
# number, and a slice of a device ("NVIDIA A100-SXM4-40GB MIG 1g.5gb") are other devices.
PEAKS = (
    # Data sheets of the vendors. NVIDIA V100 (2020); its tensor cores know fp16 (125 TFLOP/s), not bf16.
    Peak(r"(Tesla|NVIDIA) V100-SXM2-(16|32)GB", None, 15.7),
    Peak(r"(Tesla|NVIDIA) V100-PCIE-(16|32)GB", None, 14),
    # NVIDIA A100 (2021): the same for SXM4 and PCIe.
    Peak(r"(NVIDIA )?A100-(SXM4|PCI[Ee])-(40|80)GB", 312, 19.5),
    Peak(r"NVIDIA A100 80GB PCIe", 312, 19.5),
    # NVIDIA H100 (2023 and 2024): 1979, 1513 and 1671 TFLOP/s with sparsity.
    Peak(r"NVIDIA H100 80GB HBM3", 989, 67),
    Peak(r"NVIDIA H100 PCIe", 756, 51),
    Peak(r"NVIDIA H100 NVL", 835, 60),
    # NVIDIA H200 (2024), the SXM form.
    Peak(r"NVIDIA H200", 989, 67),
    # NVIDIA HGX B200 and GB200 NVL72 (2024): 4500 and, for each of the two GPUs, 5000 with sparsity.
    Peak(r"NVIDIA B200", 2250, None),
    Peak(r"NVIDIA GB200", 2500, None),
    # NVIDIA L40S (2023): 733 with sparsity, the data sheet also giving the dense figure.
    Peak(r"NVIDIA L40S", 362, 91.6),
    # AMD Instinct MI300X (2023).
    Peak(r"AMD Instinct MI300X( OAM)?", 1307, 163.4),
    # NVIDIA white papers of the GA102 (appendix A) and AD102 architectures: products accumulated in fp32.
    Peak(r"(NVIDIA )?GeForce RTX 3090", 71, 35.6),
    Peak(r"NVIDIA GeForce RTX 4090", 165, 82.6),
)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense peak of a device in FLOP/s, or None where it is not known.

    ``device_name`` is what ``torch.cuda.get_device_name()`` gives. With ``fp32`` the peak is that of true fp32
    products, torch's default; it says nothing about a run that allows TF32.
    """
    for peak in PEAKS:
        if re.fullmatch(peak.name, device_name.strip()):
            tflops = peak.bf16 if precision is Precision.bf16 else peak.fp32
            return None if tflops is None else tflops * TERA
    return None
