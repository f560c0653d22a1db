"""Other people's implementations, measured through the same contract where they are there.

A name ``peer:...`` is one line of `PEERS`. Listing them imports neither torch nor anything of theirs; an
adapter imports what it adapts when a layer is made, and nothing that was not installed or named.

``FWPKM_AUTHORS_PATH`` names a clone of the code of the authors of arXiv 2601.00671
(github.com/SakanaAI/fast-weight-product-key-memory): the folder that holds its ``src``.
"""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

AUTHORS_PATH = "FWPKM_AUTHORS_PATH"
AUTHORS_FILE = Path("src", "models", "fwpkm", "fwpkm.py")


@dataclass(frozen=True)
class Peer:
    """
    Attributes:
        layer: the layer of ours that it is held against.
        module, class_name: its adapter in this folder.
        install: the one command that makes it present.
        distribution: the package that must be installed, or empty.
        variable: the environment variable that must name a clone, or empty.
    """

    layer: str
    module: str
    class_name: str
    install: str
    distribution: str = ""
    variable: str = ""


PEERS = {
    "peer:lucidrains-fwpkm": Peer(
        layer="fwpkm",
        module="lucidrains",
        class_name="LucidrainsFwPKM",
        install="pip install 'fwpkm-bench[peers]'",
        distribution="fast-weight-product-key-memory",
    ),
    "peer:lucidrains-pkm": Peer(
        layer="pkm",
        module="lucidrains",
        class_name="LucidrainsPKM",
        install="pip install 'fwpkm-bench[peers]'",
        distribution="product-key-memory",
    ),
    "peer:authors-fwpkm": Peer(
        layer="fwpkm",
        module="authors",
        class_name="AuthorsFwPKM",
        install=f"export {AUTHORS_PATH}=path/to/fast-weight-product-key-memory",
        variable=AUTHORS_PATH,
    ),
    "peer:fla-gdn": Peer(
        layer="gdn",
        module="flash_linear_attention",
        class_name="FlaGatedDeltaNet",
        install="pip install 'fwpkm-bench[gpu]'",
        distribution="fla-core",
    ),
    "peer:fla-linear": Peer(
        layer="linear",
        module="flash_linear_attention",
        class_name="FlaLinearAttention",
        install="pip install 'fwpkm-bench[gpu]'",
        distribution="fla-core",
    ),
}


def absence(name: str) -> str:
    """Why the peer ``name`` cannot run here, and what would mend that; empty where it is there."""
    peer = PEERS[name]
    if peer.variable:
        path = os.environ.get(peer.variable, "")
        if not path:
            return f"not installed; {peer.install}"
        if not (Path(path).expanduser() / AUTHORS_FILE).is_file():
            return f"{peer.variable} is {path!r}, which has no {AUTHORS_FILE}"
        return ""
    try:
        importlib.metadata.version(peer.distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; {peer.install}"
    return ""


def require(name: str) -> None:
    """Refuse to go on without the peer ``name``.

    Raises:
        NotImplementedError: saying what would install it.
    """
    if reason := absence(name):
        raise NotImplementedError(reason)
