"""A hash of a config, to tell whether a run was made with another one."""

import hashlib
import json

from detectron2.config import CfgNode

from .defaults import flat, get_cfg


def config_digest(cfg: CfgNode) -> str:
    """A SHA-256, as hexadecimal digits, of all keys that differ from their defaults.

    New keys with defaults do not change it. Paths of the run itself are for the caller to empty.

    >>> cfg = get_cfg()
    >>> before = config_digest(cfg)
    >>> cfg.SOLVER.MAX_ITER = 7
    >>> config_digest(cfg) == before
    False
    """
    default = flat(get_cfg())
    values = sorted((k, str(v)) for k, v in flat(cfg).items() if str(v) != str(default.get(k)))
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
