"""Pascal VOC's XML, one file per image, read and written.

By VOC's convention a box is its first and last pixel, counted from 1: (xmin, ymin, xmax, ymax) is
(xmin - 1, ymin - 1, xmax, ymax) here. Most tools write plain coordinates instead, from 0; a file
does not say which, so ``corners: 0`` in the data file does.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from ..canonical import EMPTY
from ..data_file import DataFile, Source
from ..dataset import SPLITS, AnnotatedImage, Dataset, Instance, Tally, names_of, rounded
from ..dataset_contents import size_of
from ..picture_files import size_of_picture
from ..reading import PICTURE_SUFFIXES
from ..voc_files import read_voc_annotation, voc_box
from .layout import Files, Pictures, by_split, lines_of
from .pictures import copy_pictures

ROOT = re.compile(rb"<annotation[\s>]")  # CVAT's own is <annotations>
LISTS = Path("ImageSets", "Main")
UNDECLARED = (
    "boxes have a corner at 0 or between two pixels, which VOC's own counting from 1 never gives: "
    "write `corners: 0` (plain coordinates, as most tools write) or `corners: 1` into data.yaml "
    "in the folder, or into the data file"
)

LABELIMG = (
    "XML files are as labelImg writes them, and are read as `corners: 1`, VOC's counting: boxes "
    "drawn in labelImg reach up to 1 pixel too far up and left, and need `corners: 0` in data.yaml "
    "(or in a YAML file elsewhere, with path:)"
)


def find(files: Files) -> dict[str, Source]:
    """The splits of the XML files in a folder: by the lists in an ImageSets/Main, wherever in it
    that is, else by folder names.

    Raises:
        ValueError: lists in several folders; some files name a split and others do not.
    """
    found = [file for file in files.others[".xml"] if ROOT.search(file.read_bytes()[:4096])]
    if not found:
        return {}
    known = {f"{name}.txt" for name in (*SPLITS, "trainval")}
    listed = [
        file
        for file in files.others[".txt"]
        if file.name in known and file.parent.parts[-2:] == LISTS.parts
    ]
    if several := sorted({str(file.parents[2]) for file in listed})[1:]:
        raise ValueError(
            f"{files.root} has lists of images in several folders, the first are those of "
            f"{listed[0].parents[2]} and {several[0]}: name one of these folders, or say in a "
            "data file which lists are meant (train: [a list, another], val: ...)"
        )
    lists = {
        file.stem: Source(images=(file.relative_to(files.root).as_posix(),)) for file in listed
    }
    if lists:
        both = lists.pop("trainval", None)
        if both and "train" not in lists:
            lists["train"] = both
        return lists
    of_split = by_split(found, {file: files.split_of(file) for file in found}, "XML files")
    return {
        split: Source(annotations=tuple(str(f.relative_to(files.root)) for f in several))
        for split, several in of_split.items()
    }


def read(data: DataFile, splits: Mapping[str, Source], files: Files) -> Dataset:
    """The images and objects of each split; classes in alphabetical order unless they are given.

    Raises:
        FileNotFoundError: no such list or folder.
        ValueError: an XML file that is none.
    """
    tally = Tally()
    dataset = Dataset(data.file, "voc", [], {}, [], tally)
    xml_of: dict[str, list[Path]] = defaultdict(list)
    for file in files.others[".xml"]:
        xml_of[file.stem].append(file)
        if not data.splits and not ROOT.search(file.read_bytes()[:4096]):
            tally.note("XML files hold no <annotation>: not read", file.name)
    for split, source in splits.items():
        images: list[AnnotatedImage] = []
        folders = [path for name in source.images if (path := data.root / name).is_dir()]
        there = [picture for folder in folders for picture in Files(folder).pictures]
        pictures = Pictures(there or files.pictures, folders, tally)
        for name, xml in _annotation_files(data.root, source, xml_of, pictures):
            picture = pictures.beside(xml or (data.root / name).with_name(f"{_stem(name)}.xml"))
            tree = read_voc_annotation(xml) if xml else _of_nothing(picture)
            if picture is None:
                picture = pictures.named(tree.findtext("filename", ""))
            if picture is None:
                tally.fault("images are missing, or several have the name", name)
                continue
            if xml is None:
                tally.note("images have no XML file: taken as images without objects", name)
            images.append(_image(tree, picture, xml or Path(name), data.corners, tally))
        dataset.splits[split] = images
    dataset.classes = sorted({i.category for image in dataset.images for i in image.instances})
    return dataset


def _annotation_files(
    root: Path, source: Source, xml_of: Mapping[str, Sequence[Path]], pictures: Pictures
) -> Iterable[tuple[str, Path | None]]:
    """(name, XML file or None) of each image of a split.

    Raises:
        FileNotFoundError: no such list or folder.
        ValueError: a list names an image, and several XML files have the name.
    """
    lists = [name for name in source.images if not (root / name).is_dir()]
    folders = [root / name for name in source.annotations]
    if not lists:
        for path in folders or [root / name for name in source.images]:
            if not path.exists():
                raise FileNotFoundError(f"no folder of annotations {path}")
            files = Files(path).others[".xml"] if path.is_dir() else [path]
            yield from ((file.stem, file) for file in files)
    for written in lists:
        file, lines = _list(root, written)
        near = [*folders, root / "Annotations"]
        if file.parent.parts[-2:] == LISTS.parts:
            near.insert(0, file.parents[2] / "Annotations")
        for line in lines:
            # VOC's lists of a class have 1, 0 or -1 behind the name, which may have spaces itself.
            readings = (line, line.rpartition(" ")[0].strip())
            known = (n for n in readings if _stem(n) in xml_of or _stem(n) in pictures.by_stem)
            name = next(known, line)
            exact = [path for f in near if (path := f / f"{name}.xml").is_file()][:1]
            of_name = exact or xml_of.get(_stem(name), [])
            if len(of_name) > 1:
                raise ValueError(
                    f"{file} names {name!r}, and {len(of_name)} XML files may be meant, first "
                    f"{of_name[0]} and {of_name[1]}: write names with their folders in Annotations"
                )
            yield name, of_name[0] if of_name else None


def _stem(name: str) -> str:
    """Of a name with or without a suffix.

    >>> _stem("JPEGImages/a.png"), _stem("photo 3.5 m"), _stem("2012.10.1")
    ('a', 'photo 3.5 m', '2012.10.1')
    """
    path = Path(name)
    return path.stem if path.suffix.lower() in (*PICTURE_SUFFIXES, ".xml") else path.name


def _list(root: Path, written: str) -> tuple[Path, list[str]]:
    """A list, a file or the name of one in ImageSets/Main, and its lines."""
    files = [root / written, root / LISTS / f"{written}.txt"]
    for file in filter(Path.is_file, files):
        return file, [line.strip() for line in lines_of(file) if line.strip()]
    raise FileNotFoundError(
        f"no folder or list of images {files[0]}, nor {files[1]}: a split of VOC's is a folder, a "
        "list of names in a text file, or the name of one in ImageSets/Main"
    )


def _of_nothing(picture: Path | None) -> ElementTree.Element:
    """The XML of an image that has none: tools write none for one without objects."""
    root = ElementTree.Element("annotation")
    if picture is not None:
        try:
            sides = size_of_picture(picture)
        except (FileNotFoundError, ValueError):  # which is found, and said, with those of others
            return root
        _add_size(root, *sides)
    return root


def _image(
    tree: ElementTree.Element, picture: Path, xml: Path, corners: int | None, tally: Tally
) -> AnnotatedImage:
    sides = [_number(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
    image = AnnotatedImage(picture, *(size_of(*sides) or (0, 0)))
    if corners is None and tree.findtext("source/database", "").strip() == "Unknown":
        tally.note(LABELIMG, xml.name)
    for element in tree.findall("object"):
        name = element.findtext("name", "").strip()
        if not name:
            tally.fault("objects have no name", xml.name)
            continue
        try:
            x0, y0, x1, y1 = voc_box(element, xml)
        except ValueError as error:
            tally.fault("objects have no box of four numbers", str(error))
            continue
        if corners is None and (min(x0, y0) == 0 or any(v % 1 for v in (x0, y0, x1, y1))):
            tally.fault(UNDECLARED, f"{xml.name}: {x0:g}, {y0:g}, {x1:g}, {y1:g}")
        if not (x1 > x0 and y1 > y0):  # as load_voc_layout: one pixel is no box
            tally.warn(EMPTY, f"{xml.name}, {name}")
            continue
        if element.findtext("difficult", "0").strip() == "1":
            tally.note("objects are marked difficult: taken as any other", xml.name)
        shift = 0 if corners == 0 else 1
        image.instances.append(Instance(name, rounded((x0 - shift, y0 - shift, x1, y1))))
    return image


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def write(dataset: Dataset, folder: Path) -> None:
    """``Annotations/``, ``JPEGImages/``, ``ImageSets/Main/`` and a data.yaml with the classes.

    Masks, keypoints and crowd regions are left out, and counted.
    """
    import yaml

    tally = dataset.tally
    names_in = {split: names_of([i.file for i in im]) for split, im in dataset.splits.items()}
    stems = [str(Path(n).with_suffix("")) for names in names_in.values() for n in names.values()]
    prefixed = len(set(stems)) < len(stems)  # the same name in two splits
    for split, images in dataset.splits.items():
        names = {
            file: f"{split}/{name}" if prefixed else name for file, name in names_in[split].items()
        }
        copy_pictures(images, names, folder / "JPEGImages")
        for image in images:
            file = folder / "Annotations" / Path(names[image.file]).with_suffix(".xml")
            file.parent.mkdir(parents=True, exist_ok=True)
            tree = ElementTree.ElementTree(_element(image, names[image.file], tally))
            ElementTree.indent(tree)
            tree.write(file, encoding="utf-8")
        if split != "all":
            listed = folder / LISTS / f"{split}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            lines = [Path(names[image.file]).with_suffix("").as_posix() for image in images]
            listed.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    about = {"format": "voc", "classes": dataset.classes, "corners": 1}
    text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _add_size(root: ElementTree.Element, width: int, height: int) -> None:
    size = ElementTree.SubElement(root, "size")
    for side, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, side).text = str(value)


def _element(image: AnnotatedImage, name: str, tally: Tally) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = name
    _add_size(root, image.width, image.height)
    for instance in image.instances:
        if instance.iscrowd:
            tally.note("crowd regions left out: VOC has none", image.file.name)
            continue
        if instance.segmentation or instance.keypoints:
            tally.note("masks or keypoints left out: VOC's XML has boxes", image.file.name)
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = instance.category
        ElementTree.SubElement(element, "difficult").text = "0"
        box = ElementTree.SubElement(element, "bndbox")
        x0, y0, x1, y1 = instance.box
        corners = {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1}
        for corner, number in corners.items():
            ElementTree.SubElement(box, corner).text = f"{number:.10g}"
    return root
