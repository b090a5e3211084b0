"""``fpn-ext`` where the network and the images of tests/tiny.py are registered.

python tests/tiny_command.py FOLDER_OF_IMAGES VERB ...
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import tiny
from fpn_ext.__main__ import main

if __name__ == "__main__":
    tiny.register(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
