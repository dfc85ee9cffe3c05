"""Peak rates, memory and links of accelerators, by the name that the device reports. Imports no torch.

``accelerators.csv`` has the figures. A device outside that table has no known figures, and no utilization is reported
for it. A guessed peak would give a wrong utilization.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib import resources

from gpt.config import Precision

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Accelerator:
    """Figures of one device from its vendor: a row of ``accelerators.csv``. None if the device does not support a
    feature."""

    name: str
    """Whole name, as ``torch.cuda.get_device_name()`` returns it."""
    peaks: dict[str, float]
    """``bf16``, ``fp16``, ``fp32`` or ``tf32`` -> dense peak in TFLOP/s."""
    memory_gb: float
    link_gb: float
    network_gb: float | None
    has_float8: bool
    words: set[str]
    """Words that short names use for the device."""

    @property
    def half(self) -> Precision:
        """16-bit precision of the device's matrix units: bf16, or fp16 if they do not support bf16."""
        return Precision.bf16 if "bf16" in self.peaks else Precision.fp16

    @property
    def has_tf32(self) -> bool:
        """True if the device can round the factors of fp32 products to TF32."""
        return "tf32" in self.peaks

    def peak(self, precision: Precision, tf32: bool = False) -> float | None:
        """Return the dense peak in a precision, TFLOP/s; None if unknown. With ``tf32``, the peak of fp32 is that of
        TF32, if the device supports it."""
        return self.peaks.get("tf32" if tf32 and self.has_tf32 and precision is Precision.fp32 else precision.name)


VENDOR_WORDS = ("nvidia", "tesla", "geforce", "rtx", "amd", "instinct", "oam")
"""Words of a name that do not distinguish devices."""
VARIANTS = {"ti", "super", "d"}
"""Words that distinguish devices: an RTX 4080 is no RTX 4080 SUPER."""
SXM = "sxm"
"""Word for the SXM form of a module, as opposed to a PCIe card. The bare name of a chip with several forms means
SXM."""


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case, without words that do not distinguish devices; a memory size is one
    word, as ``80gb``."""
    spelled = re.sub(r"\b(\d{2,3})(?: ?(?:gib|gb|g))?\b", r"\1gb", re.sub(r"[\s_-]+", " ", name.lower()))
    return [word for word in re.sub(r"\brtx(?=\d)", "rtx ", spelled).split() if word not in VENDOR_WORDS]


def plain_name(name: str) -> str:
    """Return a device's name in lower case, without the words that only some drivers write."""
    return re.sub(r"^(nvidia|tesla) | oam$", "", name.strip().lower())


def read_accelerators() -> dict[str, Accelerator]:
    """Read ``accelerators.csv``. Return the devices by their plain names, in the order of the table."""
    lines = resources.files("gpt.accounting").joinpath("accelerators.csv").read_text().splitlines()
    found = {}
    for row in csv.DictReader((line for line in lines if not line.startswith("#")), skipinitialspace=True):
        peaks = {name: float(row[name]) for name in ("bf16", "fp16", "fp32", "tf32") if row[name]}
        memory, link, network = (float(row[name] or 0) for name in ("memory_gb", "link_gb", "network_gb"))
        words = {*words_of(row["name"]), f"{memory:.0f}gb", *row["words"].split()}
        found[plain_name(row["name"])] = Accelerator(
            row["name"], peaks, memory, link, network or None, row["float8"] == "yes", words
        )
    return found


ACCELERATORS = read_accelerators()
KNOWN = tuple(device.name for device in ACCELERATORS.values())
"""Names of known devices, for suggestions."""


def find(device_name: str) -> Accelerator | None:
    """Return the figures of the device whose driver reports this name; None for an unknown device."""
    return ACCELERATORS.get(plain_name(device_name))


def expand(short_name: str) -> list[str]:
    """Return the devices that a short name such as ``H100``, ``A100-80GB`` or Slurm's ``nvidia_h100_80gb_hbm3`` means.

    The list has several devices if the name leaves the memory open, and is empty for an unknown name. The bare name of
    a chip means the SXM form. Names from drivers are matched whole, by ``find``.
    """
    if known := find(short_name):
        return [known.name]
    given, fitting = words_of(short_name), list[Accelerator]()
    for device in ACCELERATORS.values():
        chip, *others = words_of(device.name)
        if chip in given and device.words.issuperset(given) and not VARIANTS.intersection(others).difference(given):
            fitting.append(device)
    return [device.name for device in fitting if SXM in device.words] or [device.name for device in fitting]


def peak_flops(device_name: str, precision: Precision, tf32: bool = False) -> float | None:
    """Return the dense peak of a device in FLOP/s; None if unknown.

    ``device_name`` is the result of ``torch.cuda.get_device_name()``. For ``fp32`` the peak is that of true fp32
    products; with ``tf32`` it is that of TF32, if the device supports it.
    """
    known = find(device_name)
    tflops = None if known is None else known.peak(precision, tf32)
    return None if tflops is None else tflops * TERA


def memory_bytes(device_name: str) -> int | None:
    """Return the memory of a device in bytes; None if unknown."""
    known = find(device_name)
    return None if known is None else int(known.memory_gb * GIGA)
