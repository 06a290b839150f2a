"""Files of other projects that are needed now and then: downloaded once, checked and kept."""

import hashlib
import http.client
import io
import urllib.request
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from .images import write_atomically


def cache_folder(name: str) -> Path:
    """Where files of this name are kept, beside what the Hub's library keeps."""
    return Path(HF_HOME) / "gap-diff" / name


def fetch_file(address: str, path: Path, sha256: str, *, instead: str = "fetch it by other means") -> Path:
    """Download a file, unless it is there, and return where it is.

    Args:
        address: where from.
        path: where to; its folder is made.
        sha256: what the file must be.
        instead: what to do without a network, for the error.

    Raises:
        OSError: the network fails, or the file is not what it must be; then nothing of it is kept.
    """
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        content = _read(address, path.name)
    except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and broken connections are OSErrors
        raise OSError(f"{address} could not be fetched ({error}); {instead}") from error
    if (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise OSError(f"{address}: expected a file with sha256 {sha256}, got {got}; nothing was kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def _read(address: str, name: str) -> bytes:
    content = io.BytesIO()
    with urllib.request.urlopen(address, timeout=60) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=name, disable=None) as progress:
            while part := answer.read(1 << 16):
                content.write(part)
                progress.update(len(part))
    if content.tell() < total:
        raise OSError(f"the connection broke off after {content.tell()} of {total} bytes")
    return content.getvalue()
