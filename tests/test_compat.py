"""The patches for an uncompiled Detectron2 v0.6: their effect there, and none elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fpn_ext import _d2_compat

V06_LINES = {
    "data/transforms/transform.py": "interp=Image.LINEAR",
    "data/build.py": "np.zeros((n,), dtype=np.int)",
    "layers/rotated_boxes.py": "from detectron2 import _C",
}


def fresh(code, **env):
    """Run code in a fresh Python without Detectron2 imported; returns its output."""
    # Loaded from its file: importing the package would apply the patches.
    load = (
        "import importlib.util, sys, numpy, PIL.Image\n"
        f"spec = importlib.util.spec_from_file_location('compat', {_d2_compat.__file__!r})\n"
        "compat = importlib.util.module_from_spec(spec); spec.loader.exec_module(compat)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", load + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**__import__("os").environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_detectron2(tmp_path, lines, compiled=False):
    package = tmp_path / "detectron2"
    for file, line in lines.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(line + "\n")
    (package / "__init__.py").touch()
    if compiled:
        suffix = __import__("importlib.machinery").machinery.EXTENSION_SUFFIXES[0]
        (package / f"_C{suffix}").touch()
    return {"PYTHONPATH": str(tmp_path)}


def test_nothing_on_a_healthy_detectron2(tmp_path):
    """Main branch: none of the lines is there; so is none of the patches."""
    healthy = dict.fromkeys(V06_LINES, "# no such line")
    out = fresh(
        "before = set(vars(numpy)), set(vars(PIL.Image))\n"
        "print(compat.apply())\n"
        "print((set(vars(numpy)), set(vars(PIL.Image))) == before)\n"
        "print([m for m in sys.modules if m.startswith('detectron2')])\n",
        **fake_detectron2(tmp_path, healthy, compiled=True),
    )
    assert out.splitlines() == ["[]", "True", "[]"]


def test_an_uncompiled_main_gets_an_error_with_the_remedy_alone(tmp_path):
    out = fresh(
        "import torch\n"
        "print(compat.apply(), compat.apply())\n"
        "try: torch.ops.detectron2.box_iou_rotated(torch.rand(2, 5), torch.rand(2, 5))\n"
        "except RuntimeError as error: print(error)\n",
        **fake_detectron2(tmp_path, dict.fromkeys(V06_LINES, "# no such line")),
    )
    first, error = out.splitlines()
    assert first == "['torch.ops.detectron2'] []"
    assert "build Detectron2 from source" in error


def test_a_compiled_v06_keeps_its_operators(tmp_path):
    out = fresh(
        "print(compat.has_compiled_operators())\n"
        "print([p for p in compat.apply() if 'detectron2' in p])\n",
        **fake_detectron2(tmp_path, V06_LINES, compiled=True),
    )
    assert out.splitlines() == ["True", "[]"]


def test_what_an_uncompiled_v06_gets(tmp_path):
    out = fresh("print(compat.apply())", **fake_detectron2(tmp_path, V06_LINES))
    assert "'detectron2._C', 'detectron2.evaluation.fast_eval_api'" in out


def test_an_attribute_that_exists_is_left_alone(tmp_path):
    """An older NumPy and Pillow still have the names."""
    out = fresh(
        "numpy.int = numpy.float = numpy.str = numpy.bool = PIL.Image.LINEAR = 'theirs'\n"
        "print([p for p in compat.apply() if 'detectron2' not in p])\n"
        "print(numpy.int, PIL.Image.LINEAR)\n",
        **fake_detectron2(tmp_path, V06_LINES),
    )
    assert out.splitlines() == ["[]", "theirs theirs"]


# Finders that know no module of a name; one may be the import hook of an editable install.
WITHOUT = """
class Without:
    def __init__(self, finder, name): self.finder, self.name = finder, name
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != self.name: return self.finder.find_spec(name, path, target)
def forget(name): sys.meta_path[:] = [Without(finder, name) for finder in sys.meta_path]
"""


def test_without_detectron2_the_error_says_how_to_get_it():
    out = fresh(
        WITHOUT + "forget('detectron2')\n"
        "try: compat.apply()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    assert "make setup" in out and "from source" in out


def test_an_editable_install_is_found(tmp_path):
    """It lies in no folder of sys.path: an import hook knows where."""
    fake_detectron2(tmp_path, V06_LINES, compiled=True)
    out = fresh(
        WITHOUT + "forget('detectron2')\n"
        "class Editable:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'detectron2':\n"
        f"            folder = {str(tmp_path / 'detectron2')!r}\n"
        "            return importlib.util.spec_from_file_location(\n"
        "                name, folder + '/__init__.py', submodule_search_locations=[folder])\n"
        "sys.meta_path.append(Editable())\n"
        "print(compat.detectron2_folder(), compat.has_compiled_operators())\n"
    )
    assert out == f"{tmp_path / 'detectron2'} True"


@pytest.mark.parametrize(
    ("init", "loop", "expected"),
    [
        ('__version__ = "0.6"', "", "0.6 (tag)"),
        ('__version__ = "0.6"', "    def after_backward(self):", "0.6, after the tag (main)"),
        ('__version__ = "0.7"', "    def after_backward(self):", "0.7"),
        ("", "", "of unknown version"),
    ],
)
def test_main_is_told_from_the_tag_of_its_number(tmp_path, init, loop, expected):
    fake_detectron2(tmp_path, {"__init__.py": init, "engine/train_loop.py": loop})
    assert _d2_compat.version(tmp_path / "detectron2") == expected


# The model zoo and pkg_resources, which setuptools has until version 81.

MODEL_ZOO = """import pkg_resources
from importlib import resources  # a module that is imported meanwhile
file = pkg_resources.resource_filename("detectron2.model_zoo", "configs/a.yaml")
"""


def fake_model_zoo(tmp_path):
    files = {"model_zoo/model_zoo.py": MODEL_ZOO, "model_zoo/__init__.py": ""}
    return fake_detectron2(tmp_path, files, compiled=True)


def test_the_model_zoo_without_pkg_resources(tmp_path):
    """It gets the one function it calls; nobody else sees a pkg_resources."""
    out = fresh(
        WITHOUT + "forget('pkg_resources')\n"
        "print(compat.apply(), compat.apply())\n"
        "from detectron2.model_zoo import model_zoo\n"
        "print(model_zoo.file)\n"
        "try: import pkg_resources\n"
        "except ImportError as error: print(error)\n",
        **fake_model_zoo(tmp_path),
    )
    assert out.splitlines() == [
        "['pkg_resources'] []",
        str(tmp_path / "detectron2" / "model_zoo" / "configs" / "a.yaml"),
        "No module named 'pkg_resources'",
    ]


def test_an_old_setuptools_is_used_and_its_warning_is_not_the_users(tmp_path):
    (tmp_path / "pkg_resources.py").write_text(
        "import warnings\n"
        "warnings.warn('pkg_resources is deprecated as an API.', UserWarning, stacklevel=2)\n"
        "def resource_filename(package, resource): return 'theirs'\n"
    )
    out = fresh(
        "import warnings; warnings.simplefilter('error')\n"
        "compat.apply()\n"
        "from detectron2.model_zoo import model_zoo\n"
        "print(model_zoo.file)\n",
        **fake_model_zoo(tmp_path),
    )
    assert out == "theirs"


def test_the_installed_model_zoo_without_pkg_resources():
    """Whichever setuptools is installed, as with one that has none."""
    out = subprocess.run(
        [
            sys.executable,
            "-W",
            "error:pkg_resources",
            "-c",
            "import sys\n" + WITHOUT + "forget('pkg_resources')\n"
            "import fpn_ext\n"
            "from detectron2 import model_zoo\n"
            "try: print(model_zoo.get_config_file('none.yaml'))\n"
            "except RuntimeError as error: print(error)\n",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.stdout.strip() == "none.yaml not available in Model Zoo!", out.stderr


def test_the_installed_detectron2_works_after_import_fpn_ext():
    """On any Detectron2: all that training needs can be imported; applying again does nothing."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "import fpn_ext; from fpn_ext import _d2_compat\n"
            "import detectron2.engine, detectron2.modeling, detectron2.evaluation\n"
            "from detectron2.utils.collect_env import collect_env_info; collect_env_info()\n"
            "print(_d2_compat.apply())",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]", done.stderr


uncompiled = pytest.mark.skipif(
    _d2_compat.has_compiled_operators()
    or "from detectron2 import _C"
    not in (_d2_compat.detectron2_folder() / "layers" / "rotated_boxes.py").read_text(),
    reason="only for an uncompiled Detectron2 v0.6",
)


@uncompiled
def test_a_compiled_operator_raises_with_the_remedy():
    import torch
    from detectron2.layers import batched_nms_rotated
    from detectron2.layers.rotated_boxes import pairwise_iou_rotated

    boxes = torch.rand(2, 5)
    uses = [
        lambda: pairwise_iou_rotated(boxes, boxes),
        lambda: batched_nms_rotated(boxes, torch.rand(2), torch.zeros(2), 0.5),
        lambda: _call_operator("deform_conv_forward"),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"installed without.*build Detectron2 from source"):
            use()


def _call_operator(name):
    from detectron2 import _C

    getattr(_C, name)()


def test_all_patching_is_in_one_module():
    """No other file of the package assigns into NumPy, Pillow or sys.modules."""
    for file in Path("fpn_ext").rglob("*.py"):
        if file.name != "_d2_compat.py":
            source = file.read_text()
            assert not re.search(r"sys\.modules\[[^]]*\] =", source), file
            # Modules of a model are this package's own; setattr on anything else is not.
            for of_a_model in ("setattr(module, name", "setattr(model.get_submodule(path), name"):
                source = source.replace(of_a_model, "")
            assert "setattr(" not in source, file


def test_detectron2s_export_can_be_imported_without_caffe2():
    """Its tracing and scripting work; what asks for caffe2 says what there is instead."""
    code = (
        "import fpn_ext, detectron2.export as e\n"
        "assert e.TracingAdapter and e.scripting_with_instances\n"
        "try: e.Caffe2Tracer(None, None, None)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (_d2_compat.detectron2_folder() / "export" / "api.py").read_text()
    if "\nfrom caffe2.proto import" in text:
        assert "detectron2.export.Caffe2Tracer needs caffe2" in done.stdout
        assert "fpn-ext export" in done.stdout
