"""Weight files: fetched over https only, checked for damage, read without executing code.

Detectron2 v0.6 unpickles any file, and a pickle can execute arbitrary code.
"""

import hashlib
import os
import pickle
import re
import tarfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir
from safetensors import safe_open
from safetensors.torch import load_file

from .limits import MORE_BYTES, ExcessError
from .safe_pickle import MappedFile, RefusedError, load_pickle
from .torch_pickle import check_archive, check_stream

MOST_GROWTH = 8  # of a file's tensors, which may be expanded or share numbers


class DamagedFileError(ValueError):
    """A file that is truncated or altered, or whose format does not match its name."""


def check_address(address: str, key: str = "MODEL.WEIGHTS") -> None:
    """Refuse an unencrypted URL, where a file could be altered in transit.

    Args:
        key: what has this value, for the message.

    Raises:
        ValueError: it starts with http:// or ftp://.
    """
    if address.lower().startswith(("http://", "ftp://")):
        raise ValueError(
            f"{key}: {address} is fetched without protection from changes on the way; use "
            "its https:// address, or download it and name the file"
        )


def local_file(address: str) -> str:
    """The local file for a path, an https:// URL or a Detectron2 catalog entry.

    Downloads are cached by iopath (``$FVCORE_CACHE``, else ``~/.torch/iopath_cache``) and, if the
    name contains a hash as torchvision's do (``resnet50-0676ba61.pth``: the first digits of the
    SHA-256), verified against it.

    Raises:
        FileNotFoundError: no such local file or catalog entry.
        ConnectionError: the download failed; says what to download and where to put it.
        ValueError: an unencrypted URL (:func:`check_address`), or a hash mismatch.
    """
    check_address(address)
    if "://" not in address:
        if not Path(address).is_file():
            raise FileNotFoundError(f"no file of weights {address}")
        return address
    url = _url(address)
    try:
        file = PathManager.get_local_path(url)
    except (OSError, HTTPException) as error:
        cached = cached_file(address)
        raise ConnectionError(
            f"could not download {url} ({type(error).__name__}: {error}). Download it where there "
            f"is access to it, copy it here and name the copy instead of {address}, or put it at "
            f"{cached}"
        ) from error
    expected = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    found = sha256(file) if expected else ""
    if expected and not found.startswith(expected[1]):
        raise ValueError(
            f"{file}, downloaded from {url}, is not the file its name promises: its SHA-256 begins "
            f"with {found[: len(expected[1])]}. Delete it and try again, or ask who offers it"
        )
    return file


def cached_file(address: str) -> Path:
    """Where :func:`local_file` keeps what it downloads from an address, whether it is there or not.

    Raises:
        FileNotFoundError: no such entry in Detectron2's catalogue.
    """
    return Path(get_cache_dir(), urlparse(_url(address)).path.lstrip("/"))


def _url(address: str) -> str:
    """The https:// URL of a Detectron2 catalog address; others unchanged."""
    if address.startswith(Detectron2Handler.PREFIX):
        name = address[len(Detectron2Handler.PREFIX) :]
        return Detectron2Handler.S3_DETECTRON2_PREFIX + name
    if address.startswith("catalog://"):
        try:
            return ModelCatalog.get(address[len("catalog://") :])
        except (KeyError, RuntimeError) as error:
            raise FileNotFoundError(
                f"MODEL.WEIGHTS: no {address} in Detectron2's catalogue of models"
            ) from error
    return address


def sha256(file: str) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def read_weights(file: str) -> dict[str, Any]:
    """The contents of a weight file: ``"model"``, tensors or arrays by name, and other entries.

    ``.pkl``: Detectron2's model zoo and Caffe2; ``.pyth``: pycls; ``.safetensors``; any other:
    torch, bare tensors or under ``"model"`` or ``"state_dict"``. Only tensors, arrays, numbers,
    strings and plain containers are read.

    Raises:
        DamagedFileError: a truncated or altered file: torch's reader does not notice changed
            numbers, so the checksums in its zip archives are verified first.
        ValueError: the file requests code, states more than it holds (:mod:`fpn_ext.files.limits`),
            or does not hold weights.
    """
    if file.endswith(".pkl"):
        content = _detectron_format(load_pickle(file))
    elif file.endswith(".safetensors"):
        content = {"model": _read_safetensors(file)}
    else:
        content = read_torch(file)
        if isinstance(content, dict) and file.endswith(".pyth"):
            content = _pycls_format(content)
        elif isinstance(content, dict) and "model" not in content:
            content = {"model": content.get("state_dict", content)}
    weights = content.get("model") if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise ValueError(f"{file} holds a {type(weights).__name__}, not tensors by name")
    total = 0
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor | np.ndarray | np.generic):
            raise ValueError(
                f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor. Tensors by name are "
                "needed, alone in the file or under the key 'model' or 'state_dict'"
            )
        total += tensor.nbytes
        if total > MOST_GROWTH * (os.path.getsize(file) + MORE_BYTES):
            raise ValueError(
                f"{file} is not read: its tensors have {MOST_GROWTH} times as many bytes as it, "
                f"as {name!r} of shape {tuple(tensor.shape)}, which repeats numbers"
            )
    return content


def _detectron_format(content: Any) -> Any:
    """As Detectron2 reads a .pkl: without ``__author__`` it is Caffe2's, names to be matched."""
    if not isinstance(content, dict) or ("model" in content and "__author__" in content):
        return content
    weights = content.get("blobs", content)  # detection models have "blobs", ImageNet's do not
    weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _pycls_format(content: dict[str, Any]) -> dict[str, Any]:
    weights = content.get("model_state", {})
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def read_torch(file: str) -> Any:
    """What ``torch.load`` reads as data, after a look at what it would build.

    Raises:
        DamagedFileError: a truncated or altered file.
        ValueError: it requests code, or states more than it holds.
    """
    with open(file, "rb") as stream:
        is_archive = stream.read(4) == b"PK\x03\x04"
    if not is_archive and _is_tar(file):
        # torch before 2.6 executes its code even with weights_only (CVE-2025-32434).
        raise ValueError(f"{file} is in torch's oldest format, a tar archive, which is not read")
    try:
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                check_archive(archive)
                wrong = archive.testzip()
            if wrong:
                raise DamagedFileError(f"{file} is damaged: the checksum of {wrong} does not match")
        else:
            with open(file, "rb") as stream, MappedFile.of(stream) as content:
                check_stream(content, len(content))
        return torch.load(file, map_location="cpu", weights_only=True)
    except DamagedFileError:
        raise
    except RefusedError as error:
        raise ValueError(f"{file} asks for {error}; it was not read") from None
    except ExcessError as error:
        raise DamagedFileError(f"{file} is not read: {error}") from None
    # A damaged file can raise anything, from EOFError to KeyError.
    except Exception as error:
        asked = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise ValueError(
                f"{file} asks for {asked[1]}; it was not read and nothing in it was run. Only "
                "tensors and plain containers are read: ask who made it for a plain dictionary of "
                "tensors, or for .safetensors"
            ) from None
        raise DamagedFileError(
            f"{file} is damaged or not a file of weights ({_first_line(error)})"
        ) from error


def _is_tar(file: str) -> bool:
    """Whether its first block is a tar archive's header, as torch looks for one."""
    # tarfile.open would read on, in a time that the file decides, and tarfile.is_tarfile would also
    # look into what seems compressed.
    with open(file, "rb") as stream:
        block = stream.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def metadata_of(file: str) -> dict[str, str]:
    """The text beside the tensors of a ``.safetensors``; empty for a file of another format.

    Raises:
        DamagedFileError: it is cut short, or of another format than its name says.
    """
    if not file.endswith(".safetensors"):
        return {}
    try:
        handle: Any = safe_open(file, framework="pt")
        with handle:
            return dict(handle.metadata() or {})
    except OSError:
        raise
    except Exception as error:  # safetensors' own, which derives from Exception alone
        raise DamagedFileError(f"{file} is damaged ({_first_line(error)})") from error


def _read_safetensors(file: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except OSError:
        raise
    except Exception as error:  # safetensors' error derives directly from Exception
        raise DamagedFileError(f"{file} is damaged ({_first_line(error)})") from error
