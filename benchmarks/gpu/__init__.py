"""Benchmarks on GPUs. An import of this package ends the program if a library is missing, before torch is loaded."""

import sys
from importlib.util import find_spec

NEEDED = {
    **{name: name for name in ("torch", "numpy", "packaging", "fsspec", "rich", "tqdm", "safetensors", "msgspec")},
    **{"tensorboard": "tensorboard", "yaml": "PyYAML", "hydra": "hydra-core", "omegaconf": "omegaconf"},
}
"""Module -> package that provides this module, for all imports of the programs except transformers, which is optional.
"""

if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
    print(f"found: a Python without {', '.join(missing)}", file=sys.stderr)
    print(f"expected: {', '.join(NEEDED.values())} (benchmarks/gpu/README.md)", file=sys.stderr)
    print(f"type next: {sys.executable} -m pip install {' '.join(missing)}", file=sys.stderr)
    raise SystemExit(2)
