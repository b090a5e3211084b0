"""What annotation tools write for the same six images, and what `--data` reads of it.

    python benchmarks/exporters/run.py [--tools NAME ...] [--json FILE]     (make exporters)

Each tool of requirements.txt is installed in an environment of its own, at its pinned version, and
writes its formats (tools.py). Each is read as `--data` reads it, as it was written and then with
what the message advises to declare, and compared with the boxes that were given to the tool.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fpn_ext.data.canonical import complete
from fpn_ext.data.data_file import open_data
from fpn_ext.data.dataset import Dataset
from fpn_ext.data.formats import read_dataset
from fpn_ext.data.reading import PICTURE_SUFFIXES
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.provenance import commit
from PIL import Image

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
CLASSES = ("screw", "nut", "washer")  # not in alphabetical order, nor in that of their first use
# {name: (width, height, [(class, x0, y0, x1, y1)])}; one box lies between pixels, one is a crowd's
PICTURES: dict[str, tuple[int, int, list[tuple]]] = {
    "part_01": (161, 121, [("nut", 0, 0, 60, 45), ("screw", 80, 31, 161, 121)]),
    "part_02": (97, 203, [("washer", 10, 20, 53, 77)]),
    "part_03": (320, 241, [("screw", 33, 41, 101, 99), ("screw", 150, 60, 300, 200)]),
    "part_04": (75, 75, []),
    "part_05": (201, 150, [("nut", 20.25, 30.5, 90.75, 101.5), ("washer", 100, 11, 180, 140)]),
    "part_06": (133, 99, [("washer", 1, 1, 50, 49), ("nut", 61, 40, 120, 90)]),
}
CROWD = ("part_06", ("nut", 61, 40, 120, 90))
EXACT = 0.01  # pixels; boxes are kept to as many
SHIFTED = 0.75  # pixels, on average: rounding down gives 0.5
# Torch, for the tool that is installed alone.
ALONE = ("ultralytics",)


def write_truth(folder: Path) -> None:
    """The pictures and their COCO JSON, with every field that COCO's own files have."""
    pictures = folder / "images" / "train"
    pictures.mkdir(parents=True)
    random = np.random.default_rng(0)
    images, annotations = [], []
    for image_id, (name, (width, height, objects)) in enumerate(PICTURES.items(), 1):
        pixels = random.integers(90, 110, (height, width, 3), np.uint8)
        for category, *corners in objects:
            x0, y0, x1, y1 = corners
            pixels[int(y0) : int(y1), int(x0) : int(x1), CLASSES.index(category)] += 100
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CLASSES.index(category) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int((name, (category, *corners)) == CROWD),
                    "segmentation": [],
                }
            )
        file_name = f"{name}.jpg"
        Image.fromarray(pixels).save(pictures / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
    categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(CLASSES, 1)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "annotations").mkdir()
    text = json.dumps({**content, "categories": categories})
    (folder / "annotations" / "instances_train.json").write_text(text)


def environments() -> dict[str, list[str]]:
    """Packages of each environment, by the name of the first."""
    paragraphs = (HERE / "requirements.txt").read_text().split("\n\n")
    packages = [
        [line for line in paragraph.splitlines() if line and not line.startswith("#")]
        for paragraph in paragraphs
    ]
    return {pins[0].partition("==")[0]: pins for pins in packages if pins}


def install(tool: str, pins: list[str], folder: Path) -> Path:
    """The Python of a tool's environment, made where it is not there at these versions."""
    python, done = folder / tool / "bin" / "python", folder / tool / "installed.txt"
    if not (done.is_file() and done.read_text() == "\n".join(pins)):
        uv = str(Path(sys.prefix) / ".uv" / "bin" / "uv")
        uv = uv if Path(uv).is_file() else "uv"
        new = [uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder / tool)]
        alone = ["--no-deps"] if tool in ALONE else []
        packages = [uv, "pip", "install", "-q", "--python", str(python), *alone, *pins]
        for command in (new, packages):
            subprocess.run(command, check=True, env={"UV_SYSTEM_CERTS": "true", **os.environ})
        done.write_text("\n".join(pins))
    return python


def write_with(tool: str, python: Path, truth: Path, output: Path) -> str:
    """Have a tool write all its formats; the last line of its error, or ``""``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(output.parent)}
    environment.pop("PYTHONPATH", None)
    if tool in ALONE:
        environment["PYTHONPATH"] = str(Path(np.__file__).parents[1])
    command = [str(python), str(HERE / "tools.py"), tool, str(truth), str(output)]
    done = subprocess.run(
        command, env=environment, cwd=output.parent, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return ""


def add_pictures(folder: Path, pictures: Path) -> None:
    """As a person does where a tool writes annotations alone."""
    if any(file.suffix in PICTURE_SUFFIXES for file in folder.rglob("*")):
        return
    to = folder / "images"
    if (folder / "labels" / "train").is_dir():
        to /= "train"
    elif list(folder.glob("part_*")):  # a file for each picture, which are its neighbours
        to = folder
    shutil.copytree(pictures, to, dirs_exist_ok=True)


def read(path: Path) -> Dataset:
    """As `--data` does."""
    data = open_data(path)
    return complete(read_dataset(data), data.classes)


def compared(dataset: Dataset) -> dict[str, Any]:
    """What was read against what was given to the tool.

    Returns:
        ``verdict``: ``equal``; ``rounded`` where coordinates are off by a pixel at most and not
        all to the same side, as a tool's whole numbers are; ``different``. ``max_difference`` and
        ``mean_difference`` of a box's first corner, with its sign, in pixels. ``crowd``: ``kept``,
        ``object`` or ``left out``. ``wrong``: what differs.
    """
    images = {image.file.stem: image for image in dataset.images}
    wrong: list[str] = []
    differences: list[np.ndarray] = []
    crowd = "left out"
    if set(images) != set(PICTURES):
        wrong.append(f"{len(set(PICTURES) - set(images))} images missing")
    if set(dataset.classes) != set(CLASSES):
        wrong.append(f"classes {', '.join(dataset.classes)}")
    for name, (_, _, objects) in PICTURES.items():
        if name not in images:
            continue
        found = list(images[name].instances)
        for category, *corners in objects:
            same = [
                (np.abs(np.subtract(i.box, corners)).max(), n)
                for n, i in enumerate(found)
                if i.category == category
            ]
            is_crowd = (name, (category, *corners)) == CROWD
            if not same:
                if not is_crowd:
                    wrong.append(f"a {category} of {name} missing")
                continue
            instance = found.pop(min(same)[1])
            differences.append(np.subtract(instance.box, corners))
            if is_crowd:
                crowd = "kept" if instance.iscrowd else "object"
            elif instance.iscrowd:
                wrong.append(f"a {category} of {name} is a crowd region")
        if found:
            wrong.append(f"{len(found)} objects too many on {name}")
    largest = float(np.abs(differences).max()) if differences else 0.0
    shift = float(np.mean(differences, axis=0)[:2].mean()) if differences else 0.0
    if largest >= 1 + EXACT or abs(shift) > SHIFTED:
        wrong.append(
            f"boxes up to {largest:.4g} pixels off, first corners by {shift:.2g} on average"
        )
    return {
        "verdict": "different" if wrong else "equal" if largest <= EXACT else "rounded",
        "max_difference": round(largest, 4),
        "mean_difference": round(shift, 4),
        "crowd": crowd,
        "wrong": wrong,
    }


def row_of(path: Path, folder: Path, work: Path) -> dict[str, Any]:
    try:
        dataset = read(path)
    except (ValueError, FileNotFoundError) as error:
        return {"verdict": "rejected", "message": shortened(str(error), folder, work)}
    return {
        "read_as": dataset.format,
        **compared(dataset),
        "said": [shortened(line, folder, work) for line in dataset.tally.lines()],
    }


def shortened(text: str, folder: Path, work: Path) -> str:
    """A message without the folders of this run."""
    text = text.replace(f"{folder}/", "").replace(str(folder), "FOLDER").replace(f"{work}/", "")
    return text.replace(" `fpn-ext data --data` lists more", "")


def remedy(row: dict[str, Any]) -> dict[str, Any]:
    """What the message, or the notes, say that can be declared."""
    if row["verdict"] in ("equal", "rounded"):
        return {}
    text = " ".join([row.get("message", ""), *row.get("said", [])])
    known = {"corners": 0, "unannotated": "empty"}
    return {key: value for key, value in known.items() if f"`{key}: {value}`" in text}


def rows_of(tool: str, pins: list[str], output: Path, pictures: Path) -> list[dict[str, Any]]:
    """A row for each format and for what is declared of it."""
    version = ", ".join(pin.replace("==", " ") for pin in pins)
    rows = []
    for folder in sorted(p for p in output.iterdir() if p.is_dir() and p.name != "parts"):
        add_pictures(folder, pictures)
        row = {"tool": version, "format": folder.name}
        path, declared = folder, {}
        while True:
            text = ", ".join(f"{key}: {value}" for key, value in declared.items())
            rows.append({**row, "declared": text, **row_of(path, folder, output.parent)})
            more = remedy(rows[-1])
            if not more or more.items() <= declared.items():
                break
            declared |= more
            path = output / "declared.yaml"
            path.write_text(yaml.safe_dump({"name": "parts", "path": str(folder), **declared}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = environments()
    parser.add_argument("--tools", nargs="+", choices=known, default=list(known))
    parser.add_argument("--environments", type=Path, default=PROJECT / ".venv-exporters")
    parser.add_argument("--json", type=Path, help="default: print only")
    parser.add_argument("--keep", type=Path, help="a new folder for what the tools wrote")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.keep or Path(temporary) / "made").absolute()
        write_truth(work / "truth")
        (work / "written").mkdir()
        for tool in arguments.tools:
            python = install(tool, known[tool], arguments.environments.absolute())
            # Gone afterwards, as after a move to another machine.
            given = Path(shutil.copytree(work / "truth", work / "given"))
            failed = write_with(tool, python, given, work / "written" / tool)
            shutil.rmtree(given)
            shutil.move(work / "written" / tool, work / tool)
            pictures = work / "truth" / "images" / "train"
            made = rows_of(tool, known[tool], work / tool, pictures)
            if failed:
                made.append(
                    {"tool": tool, "format": "", "declared": "", "verdict": "tool failed",
                     "message": failed}
                )  # fmt: skip
            for row in made:
                about = row.get("message") or "; ".join([*row["wrong"], *row["said"]])
                line = [row["tool"], row["format"], row["declared"], row["verdict"]]
                print(" | ".join([*line, row.get("crowd", ""), about]), flush=True)
            rows += made
    if arguments.json:
        write_json(arguments.json, {"commit": commit(), "rows": rows})


if __name__ == "__main__":
    main()
