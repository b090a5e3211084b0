import copy

import fpn_ext
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from fpn_ext.bottom_up.freezing import freeze
from fpn_ext.bottom_up.norms import replace_norms
from fpn_ext.engine.trainer import Trainer
from torch import nn


def parts():
    """Two batch norms, one with a name that is a prefix of another module's."""
    return nn.ModuleDict(
        {
            "res": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
            "res2": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        }
    )


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_name_stands_for_whole_parts_only():
    model = parts()
    freeze(model, ["res"])
    assert {name.split(".")[0] for name in trainable(model)} == {"res2"}
    assert isinstance(model["res"][1], FrozenBatchNorm2d)
    assert type(model["res2"][1]) is nn.BatchNorm2d


def test_one_parameter():
    model = parts()
    freeze(model, ["res2.0.bias"])
    assert set(parts().state_dict()) == set(model.state_dict())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["res2.0.bias"]


def test_a_batch_norm_itself():
    model = parts()
    freeze(model, ["res.1"])
    assert isinstance(model["res"][1], FrozenBatchNorm2d)


def test_nothing_asked_nothing_done(caplog):
    caplog.set_level("INFO")
    model = parts()
    freeze(model, [])
    assert len(trainable(model)) == len(list(model.parameters())) and caplog.text == ""


def test_what_is_frozen_is_in_the_log(caplog):
    caplog.set_level("INFO", logger="fpn_ext")
    freeze(parts(), ["res2"])  # 4 * 4 * 9 weights and 4 biases, 2 * 4 of the norm
    assert "res2, 156 values in 4 parameters, 1 batch norms" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rse2"], r"FREEZE: nothing in the model is named 'rse2'; nearest valid: 'res2'"),
        (["res2.7"], r"named 'res2\.7'; nearest valid: 'res2\.\d'"),
        (["res.0.weight.x"], r"named 'res\.0\.weight\.x'"),
        (["res."], r"named 'res\.'"),
        (["res", "res2"], r"leaves nothing to train"),
    ],
)
def test_mistakes(names, message):
    model = parts()
    with pytest.raises(ValueError, match=message):
        freeze(model, names)


def test_a_wrong_name_freezes_nothing():
    model = parts()
    with pytest.raises(ValueError):
        freeze(model, ["res", "none"])
    assert len(trainable(model)) == len(list(model.parameters()))


def test_a_frozen_norm_gives_what_the_norm_gave_in_evaluation():
    model = parts()
    x = torch.randn(2, 3, 9, 9)
    model["res"](x), model["res"](2 * x)  # running statistics that are not the first ones
    expected = copy.deepcopy(model["res"]).eval()(x)
    assert replace_norms(model, "FrozenBN") == 2
    torch.testing.assert_close(model["res"].train()(x), expected)


def test_a_batch_norm_that_does_more():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"Scaled: it does more"):
        replace_norms(nn.Sequential(Scaled(4)), "FrozenBN")


def test_timms_norm_keeps_its_activation():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.BatchNormAct2d(4))
    x = torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(model).eval()(x)
    assert replace_norms(model, "FrozenBN") == 1 and expected.min() == 0
    torch.testing.assert_close(model.train()(x), expected)


def test_a_training_step_changes_all_but_what_is_frozen(small_cfg):
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    small_cfg.MODEL.RESNETS.NORM = "BN"
    small_cfg.MODEL.FPN_EXT.FREEZE = ["backbone.bottom_up", "proposal_generator.rpn_head"]
    model = Trainer.build_model(small_cfg).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = Trainer.build_optimizer(small_cfg, model)
    features = model.backbone(torch.rand(2, 3, 64, 64))
    loss = sum(f.square().sum() for f in features.values())
    (loss + sum(p.sum() for p in model.roi_heads.parameters())).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith(("backbone.bottom_up.", "proposal_generator.")) for k in changed)
    assert {k.split(".")[0] for k in changed} == {"backbone", "roi_heads"}


def test_a_frozen_models_checkpoint_is_the_models(small_cfg):
    """Except for num_batches_tracked, which frozen batch norms have on main only."""
    small_cfg.MODEL.RESNETS.NORM = "BN"
    plain = build_model(small_cfg)
    small_cfg.MODEL.FPN_EXT.FREEZE = ["backbone.bottom_up"]
    frozen = Trainer.build_model(small_cfg)
    left = set(plain.state_dict()) ^ set(frozen.state_dict())
    assert all(name.endswith("num_batches_tracked") for name in left)


def test_the_key_takes_names_only():
    cfg = fpn_ext.load_config(
        "configs/demo/faster_rcnn_R_18_FPN.yaml", ["MODEL.FPN_EXT.FREEZE", "[2, '']"]
    )
    with pytest.raises(ValueError, match=r"FREEZE must list names of modules, got \[2, ''\]"):
        fpn_ext.check_config(cfg)
