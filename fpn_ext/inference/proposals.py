"""Write a trained RPN's proposals for whole datasets, for use by Fast R-CNN."""

from collections.abc import Sequence
from pathlib import Path

from detectron2.modeling import build_model

from ..config.level_table import level_table_in_errors
from ..config.prepare import prepare
from ..data.datasets import check_registered, register_datasets
from ..files.checkpoint import CompleteCheckpointer
from ..proposals.sources import check_top_k, generate_proposals, write_for_each
from ..speed.optimize import model_for_inference


def generate(
    config_file: str, opts: Sequence[str], datasets: Sequence[str], folder: Path, top_k: int
) -> None:
    """Write ``folder/NAME.safetensors`` for each dataset, with the RPN of a config.

    Args:
        config_file: of a ProposalNetwork, or a detector with an RPN.
        opts: ``KEY VALUE ...`` overrides; ``MODEL.WEIGHTS`` must be set here or in the file.
        datasets: names of registered datasets.
        top_k: max proposals per image.

    Raises:
        FileNotFoundError, ValueError: what :func:`fpn_ext.prepare` finds wrong, an unregistered
            dataset, ``top_k`` out of range, a model without an RPN.
    """
    check_top_k(top_k)
    register_datasets()
    has_data = "DATASETS.FPN_EXT.DATA" in opts  # prepare registers its splits
    if not has_data:
        check_registered(datasets)  # first: --datasets swallows overrides as names
    cfg, notes = prepare(config_file, opts, weights="required")
    check_registered(datasets)
    print("\n".join(notes))
    cfg.freeze()
    with level_table_in_errors(cfg):
        model = build_model(cfg)
    CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    model = model_for_inference(cfg, model)
    write_for_each(
        datasets, folder, lambda name, file: generate_proposals(cfg, model, name, file, top_k)
    )
