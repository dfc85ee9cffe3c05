"""Names, shapes and config in a file of weights, read without the weights and without torch.

Owns the inspection of safetensors files, their index, and files of ``torch.save``. A file that is cut short is found
here, for the price of its first kilobytes; a flipped bit is not.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from launch.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError)

Shape = tuple[int, ...]


def tensors_in_folder(folder: Path) -> dict[str, tuple[Path, Shape]]:
    """Map the name of every tensor in a folder of transformers, one file or several with an index, to file and shape.

    Raises:
        ConfigError: there are no safetensors, one is missing or cut short, or the index names what is not there.
    """
    index = read_index(folder)
    found: dict[str, tuple[Path, Shape]] = {}
    for path in sorted({folder / name for name in index.values()} if index else {folder / SINGLE}):
        for name, shape in safetensors_shapes(path).items():
            if index and index.get(name) != path.name:
                raise damaged_file_error(folder / INDEX, f"it does not say that {name} is in {path.name}")
            found[name] = (path, shape)
    gone = sorted(index.keys() - found.keys())
    if gone:
        raise damaged_file_error(folder / INDEX, f"{', '.join(gone[:3])} not in the files that it names")
    return found


def read_index(folder: Path) -> dict[str, str]:
    """Read the index: tensor -> file; empty where one file holds them all.

    Raises:
        ConfigError: there is neither a file nor an index, or the index makes no sense.
    """
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        holds = f"{pickled[0].name} and no {SINGLE}" if pickled else f"neither {SINGLE} nor {INDEX}"
        convert = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
        raise ConfigError(
            f"{folder} holds {holds}",
            "weights as safetensors, which cannot run code when they are read",
            f"""python -c "{convert}.save_pretrained('{folder}-safetensors')\"""",
        )
    try:
        index = json.loads((folder / INDEX).read_bytes())["weight_map"]
        # Names of files only: an index must not lead out of its folder.
        names = {str(tensor): Path(str(file)).name for tensor, file in index.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged_file_error(folder / INDEX, f"no index: {error}") from error
    return names


def safetensors_shapes(path: Path) -> dict[str, Shape]:
    """Read name and shape of every tensor of one safetensors file, from its header."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise damaged_file_error(path, str(error)) from error


def damaged_file_error(path: Path, why: str) -> ConfigError:
    """Refusal of a file that is not what was written."""
    return ConfigError(f"{path} cannot be used ({why})", "the file as it was written", "another copy of it")


def torch_file_contents(path: Path) -> dict[str, Any]:
    """Read the object in a file of ``torch.save``, with shapes in the place of tensors.

    Raises:
        ConfigError: no such file, or it holds anything but plain values and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            value = ShapeUnpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, *UNREADABLE) as error:
        raise damaged_file_error(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged_file_error(path, f"a {type(value).__name__} instead of a dictionary")
    return value


def verify_torch_file(path: Path) -> None:
    """Read a file of ``torch.save`` whole and compare the checksums in it, which torch itself does not.

    Raises:
        ConfigError: it is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged_file_error(path, str(error)) from error
    if bad is not None:
        raise damaged_file_error(path, f"{bad} has a wrong checksum")


class ShapeUnpickler(pickle.Unpickler):
    """Unpickler of torch's files without torch: of a tensor it keeps the shape; refuses other classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *rest: tuple(size)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict  # not dict: a state_dict has attributes, too
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None
