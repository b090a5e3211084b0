"""The names in ``fpn_ext.__all__``, and every module that declares a config key."""

# ruff: noqa: F401, F403

from .bottom_up import freezing
from .bottom_up.pixels import resolve_bottom_up
from .components import *
from .config import data_keys
from .config.check import check_config
from .config.defaults import add_fpn_ext_config, get_cfg
from .config.level_keys import resolve_levels
from .config.level_table import level_table
from .config.load import load_config
from .config.prepare import prepare
from .data import class_names, named, reading
from .engine import best, ema, repeatable, steps, validation_loss
from .evaluation import recall
from .inference.detections import Detections
from .inference.detector import Detector
from .modeling.level_rules import assign_levels
from .modeling.pooler import LevelMappedROIPooler
from .modeling.top_blocks import Subsample
from .speed import folded_norms, winograd_training
from .speed.optimize import optimize_for_inference
