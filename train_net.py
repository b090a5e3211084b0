"""Train or evaluate a config, with the options of Detectron2's own tools/train_net.py.

python train_net.py --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/demo_R_18/model_final.pth

The same as ``fpn-ext train`` and ``fpn-ext eval``.
"""

import sys

from fpn_ext.__main__ import main

if __name__ == "__main__":
    words = sys.argv[1:]
    verb = "eval" if "--eval-only" in words else "train"
    sys.exit(main([verb, *(word for word in words if word != "--eval-only")]))
