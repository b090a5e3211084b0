"""``python -m fpn_ext.kernels.compiled``: compile the kernels for this processor."""

from .build import main

if __name__ == "__main__":
    main()
