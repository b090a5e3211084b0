"""Whether processes that load images can hand them over, which they do in shared memory."""

import os
import tempfile

from detectron2.config import CfgNode

FOLDER = "/dev/shm"  # Linux


def check_shared_memory(cfg: CfgNode) -> None:
    """Raise unless ``DATALOADER.NUM_WORKERS`` is 0 or shared memory can be written.

    Raises:
        ValueError: it cannot, as in a container with a read-only /dev/shm.
    """
    workers = cfg.DATALOADER.NUM_WORKERS
    if not workers or not os.path.isdir(FOLDER):
        return
    try:
        tempfile.TemporaryFile(dir=FOLDER).close()
    except OSError as error:
        raise ValueError(
            f"DATALOADER.NUM_WORKERS {workers}: processes that load images hand them over in "
            f"{FOLDER}, which cannot be written ({error.strerror}); set DATALOADER.NUM_WORKERS 0, "
            f"or make {FOLDER} writable"
        ) from error
