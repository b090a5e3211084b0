"""How big a reproduction of the paper's tables is."""

from dataclasses import dataclass

from ..files.shipped import configs

CONFIGS = configs() / "paper"


@dataclass(frozen=True)
class Scale:
    """How big a reproduction is.

    Args:
        overlay: YAML file in ``configs/paper/scale/`` overlaid on every row's; such a scale starts
            from the weights of :mod:`fpn_ext.paper.pretrain`. "" for the paper's recipe.
        anchor_factor: scales the row's anchor sizes, to match the smaller images.
        num_gpus: for each training, unless another number is asked for.
    """

    overlay: str = ""
    anchor_factor: float = 1.0
    num_gpus: int = 1

    def overlay_of(self, table: int) -> str:
        """The overlay for the rows of a table: its own, which is based on the scale's, if any."""
        own = self.overlay.replace(".yaml", f"_table{table}.yaml")
        return own if (CONFIGS / "scale" / own).is_file() else self.overlay


SCALES = {
    "coco": Scale(),
    "small": Scale("small.yaml", anchor_factor=0.5, num_gpus=0),
    "small-context": Scale("small_context.yaml", anchor_factor=0.5, num_gpus=0),
    "small-gpu": Scale("small_gpu.yaml"),
}
