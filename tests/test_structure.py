"""The project's structure: imports between rooms, and that names in the docs exist."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fpn_ext
import pytest
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.utils.registry import Registry
from fpn_ext.__main__ import VERBS

PACKAGE = Path("fpn_ext")
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a room imports only from rooms before it. "" is the ground, fpn_ext/*.py.
ROOMS = (
    *("", "kernels", "files", "reporting", "doctor", "registries", "bottom_up", "data"),
    *("modeling", "proposals", "variants", "speed", "evaluation", "config", "engine"),
    *("export", "inference", "inspection", "paper", "tools"),
)
# The roof: what imports all rooms to register their components. Rooms hand the import on.
ROOF = ("__init__.py", "__main__.py", "api.py", "components.py", "registration.py")
MOST_LINES = 400


def room_of(parts):
    """The room of a module's path in the package, ``("modeling", "fpn")`` or ``("levels",)``."""
    return parts[0] if (PACKAGE / parts[0]).is_dir() else ""


def imports_of(file):
    """Paths in the package of the modules that a file imports, wherever in the file."""
    package = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1]]
            elif (node.module or "").partition(".")[0] == "fpn_ext":
                base = []
            else:
                continue
            base += (node.module or "").removeprefix("fpn_ext").strip(".").split(".")
            base = [name for name in base if name]
            for alias in node.names:
                path = PACKAGE.joinpath(*base, alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                if base or is_module:
                    yield (*base, alias.name) if is_module else tuple(base)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("fpn_ext."):
                    yield tuple(alias.name.split(".")[1:])


def test_every_file_is_in_a_room():
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} == {*ROOMS} - {""}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file):
    parts = file.relative_to(PACKAGE).parts
    if len(parts) == 1 and parts[0] in ROOF:
        return
    here = room_of((*parts[:-1], parts[-1].removesuffix(".py")))
    for imported in imports_of(file):
        if imported == ("components",) and parts[-1] == "__init__.py":
            continue
        if imported == ("api",) and parts == ("config", "defaults.py"):
            continue  # within a function: when it is called, all rooms are there
        assert ROOMS.index(room_of(imported)) <= ROOMS.index(here), f"{file} imports {imported}"


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    for text in ("from ..config.check import x", "from fpn_ext.config import check"):
        file = PACKAGE / "modeling" / "fpn.py"
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        (imported,) = imports_of(file)
        assert imported == ("config", "check")
        assert ROOMS.index(room_of(imported)) > ROOMS.index("modeling")


def test_the_three_components_do_not_import_one_another():
    """This makes them swappable one by one."""
    components = {("modeling", name) for name in ("fpn", "anchors", "pooler")}
    for _, name in components:
        assert not components & set(imports_of(PACKAGE / "modeling" / f"{name}.py"))


def test_rooms_that_need_detectron2s_models_register_ours_first():
    """Otherwise importing one of their modules first would be a circular import."""
    for room in ROOMS[1:]:
        needs = any(
            re.search(r"^(from|import) detectron2\.(modeling|engine)", file.read_text(), re.M)
            for file in (PACKAGE / room).glob("*.py")
        )
        text = (PACKAGE / room / "__init__.py").read_text()
        if room == "doctor":  # asks in processes of their own
            continue
        assert not needs or "import components" in text, room


def test_importing_the_package_and_a_verbs_help_import_nothing_heavy():
    code = (
        "import sys, fpn_ext; from fpn_ext.__main__ import VERBS\n"
        "for verb in VERBS.values(): verb.parser().format_help()\n"
        "assert not {'torch', 'detectron2', 'numpy', 'matplotlib', 'yaml'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_are_short():
    lengths = {str(file): len(file.read_text().splitlines()) for file in FILES}
    assert {f: n for f, n in lengths.items() if n > MOST_LINES} == {}


CHANGED_WHERE = re.findall(
    r"^\| ([^|]+) \| `(fpn_ext/[\w/]+\.py)` \| ([^|]+) \|$",
    Path("docs/contributing.md").read_text(),
    flags=re.M,
)


@pytest.mark.parametrize(("what", "file", "symbols"), CHANGED_WHERE)
def test_what_is_changed_where_is_there(what, file, symbols):
    text = Path(file).read_text()
    for symbol in re.findall(r"`([^`]+)`", symbols):
        defined = rf"^\s*(def|class) {symbol}\b|^{symbol}\b.*=|\"{symbol}|f\"{symbol}"
        assert re.search(defined, text, flags=re.M), f"{what}: no {symbol} in {file}"


def test_the_table_of_what_is_changed_where_is_read():
    assert len(CHANGED_WHERE) >= 35


def test_files_are_read_by_the_modules_that_guard_it():
    """Detectron2's loaders and pickle execute code in files; these modules guard them."""
    guarded = {
        r"\bDetectionCheckpointer\(": set(),  # SafeCheckpointer
        r"\bDefaultPredictor\(": {"fpn_ext/inference/pictures.py"},
        r"\bpickle\.(loads?|Unpickler)\b": {"fpn_ext/files/safe_pickle.py"},
        r"\btorch\.load\((?!.*weights_only=True)": set(),
        r"allow_pickle=True|yaml\.(unsafe_load|load)\(|(?<![.\w])(eval|exec)\(": set(),
    }
    for file in (*FILES, Path("train_net.py"), *Path("benchmarks").glob("*.py")):
        text = file.read_text()
        for pattern, allowed in guarded.items():
            assert not re.search(pattern, text) or str(file) in allowed, f"{file}: {pattern}"


def test_nothing_is_given_to_torchscript_at_import():
    """What the package uses of torch.jit are notes to it, and questions whether it is at work."""
    used = set()
    for file in FILES:
        tree = ast.parse(file.read_text())
        if file == PACKAGE / "export" / "formats.py":  # writes TorchScript, in functions
            tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.jit":
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                assert "torch.jit" not in ast.unparse(node), file
    assert used == {"Final", "unused", "is_scripting", "is_tracing"}


@pytest.mark.parametrize("file", sorted(Path("tests").glob("test_*.py")), ids=str)
def test_tests_that_rest_on_torchscript_say_so(file):
    source = file.read_text()
    used = r"torch\.jit\.(script|trace)\(|\.scripting_with_instances\("
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            uses = re.search(used, ast.get_source_segment(source, node))
            assert bool(uses) == ("pytest.mark.torchscript" in marks), node.name


def test_the_components_are_written_from_scratch():
    """No subclass of, and no call into, Detectron2's FPN, anchor generator or ROIPooler."""
    for file in (*(PACKAGE / "modeling").glob("*.py"), PACKAGE / "variants" / "all_levels.py"):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        forbidden = {"FPN", "DefaultAnchorGenerator", "ROIPooler", "poolers", "anchor_generator"}
        assert not imported & forbidden
    for component in (fpn_ext.FeaturePyramid, fpn_ext.PyramidAnchorGenerator):
        bases = {base.__name__ for base in component.__mro__}
        assert not bases & {"FPN", "DefaultAnchorGenerator"}


def test_everything_public_is_exported_and_described():
    public = {"FeaturePyramid", "PyramidAnchorGenerator", "LevelMappedROIPooler", "PyramidROIHeads"}
    functions = {"get_cfg", "add_fpn_ext_config", "assign_levels", "load_config", "check_config"}
    assert public | functions <= set(fpn_ext.__all__)
    for name in fpn_ext.__all__:
        assert getattr(fpn_ext, name).__doc__, f"{name} has no docstring"


DOCUMENTS = [Path("README.md"), *Path("docs").rglob("*.md"), *Path("configs").glob("*.md"),
             Path("datasets/README.md"), *Path("examples").glob("*.md")]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_the_files_a_document_names_exist(document):
    """Paths in back-ticks and in commands, unless a run makes them; and links."""
    text = document.read_text()
    made_by_runs = ("output/", "datasets/", "out/", "my_", "/path/")
    named = set(re.findall(r"(?:`|\s)((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|txt|sh|in))\b", text))
    links = set(re.findall(r"\]\(([^)#]+)\)", text))
    missing = [
        path
        for path in sorted(named | links)
        if not path.startswith(("http", *made_by_runs))
        and not Path(path).exists()
        and not (document.parent / path).exists()
    ]
    assert missing == []


def test_the_commands_of_the_readme_exist():
    readme = Path("README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", Path("Makefile").read_text(), flags=re.M))
    commands = set(re.findall(r"(?:^    |`)make ([a-z]+)", readme, flags=re.M))
    assert {"demo", "test"} <= commands <= targets


COMMANDS = [
    (document, command)
    for document in DOCUMENTS
    for command in re.findall(
        r"^(?:    |\$ )?fpn-ext ((?:.*\\\n)*.*)$|`fpn-ext ([^`]+)`",
        document.read_text(),
        flags=re.M,
    )
]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=str)
def test_a_command_of_a_document_exists(document, command):
    """Its verb and every option exist."""
    words = "".join(command).replace("\\\n", " ").partition(" #")[0].split()
    if words[0] == "VERB":
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    assert name in VERBS or any(verb.startswith(f"{name} ") for verb in VERBS)
    if name in VERBS:
        known = {
            option for action in VERBS[name].parser()._actions for option in action.option_strings
        }
        assert {word for word in words if word.startswith("--")} <= known


def test_ci_runs_the_readmes_test_command():
    script = Path(".ci/run").read_text().splitlines()
    assert "make test" in script


def test_the_errors_the_documents_quote_are_real():
    """Each is raised here, or its fixed parts stand in the source; <...> is what varies."""
    page = Path("docs/start/troubleshooting.md")
    quoted = re.findall(r"^> `(.+)`$", page.read_text(), flags=re.M)
    assert len(quoted) >= 5
    raised = []
    with pytest.raises(KeyError) as error:
        Registry("BACKBONE").get("FeaturePyramid")
    raised.append(error.value.args[0])
    with pytest.raises(KeyError) as error:
        get_detectron2_cfg().merge_from_file("configs/demo/faster_rcnn_R_18_FPN.yaml")
    raised.append(error.value.args[0])
    with pytest.raises(ImportError) as error:
        exec("from detectron2 import _NoSuchModule")
    raised.append("ImportError: " + str(error.value).replace("_NoSuchModule", "_C"))

    source = "".join(file.read_text() for file in FILES)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # join adjacent string literals
    source = re.sub(r"\{[^{}]*\}", "<>", source)  # what an f-string fills in
    source += Path("requirements/install.sh").read_text()
    for message in quoted:
        fixed_parts = re.split(r"<[^>]*>", message)
        assert any(message in text for text in raised) or all(
            part.strip() in source for part in fixed_parts
        ), message


@pytest.mark.parametrize("document", ["docs/guides/swapping.md", "datasets/README.md"])
def test_the_python_in_a_document_runs(document):
    (code,) = re.findall(r"```python\n(.*?)```", Path(document).read_text(), flags=re.S)
    exec(compile(code, document, "exec"), {})


def test_the_yaml_in_the_readme_is_a_config(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", Path("README.md").read_text(), flags=re.S)
    (tmp_path / "swap.yaml").write_text(text)
    cfg = fpn_ext.load_config(str(tmp_path / "swap.yaml"))
    assert cfg.MODEL.FPN_EXT == fpn_ext.get_cfg().MODEL.FPN_EXT, "the defaults are shown"
    assert cfg.MODEL.BACKBONE.NAME == "FeaturePyramid"


def test_what_the_readme_appends_goes_with_its_first_training():
    """Every choice of components, on top of the config that the README trains."""
    readme = Path("README.md").read_text()
    (block,) = re.findall(r"Append any of these to a command:\n\n((?: {4}.*\n)+)", readme)
    lines = re.sub(r" +#.*", "", block).replace("\\\n", "").strip().splitlines()
    (config,) = re.findall(r"fpn-ext train --config-file (\S+) --num-gpus 8", readme)
    assert len(lines) == 4
    for line in lines:
        opts = [*shlex.split(line), "MODEL.DEVICE", "cpu"]
        cfg = fpn_ext.prepare(config, opts, training=True, weights="start").cfg
        for key, value in zip(opts[::2], opts[1::2], strict=True):
            node = cfg
            for name in key.split("."):
                node = node[name]
            assert str(node).replace("'", '"') == value, key
