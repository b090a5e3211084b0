"""A test dataset in Pascal VOC layout."""

from PIL import Image

CLASSES = ["cat", "dog"]


def write_voc(root, images, split="train"):
    """``images``: {image id: [(class, xmin, ymin, xmax, ymax), ...]}, of 80 x 60 pixels each."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(images) + "\n")
    for image_id, objects in images.items():
        Image.new("RGB", (80, 60)).save(root / "JPEGImages" / f"{image_id}.jpg")
        elements = "".join(
            f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>0</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, x0, y0, x1, y1 in objects
        )
        (root / "Annotations" / f"{image_id}.xml").write_text(
            f"<annotation><filename>{image_id}.jpg</filename>"
            f"<size><width>80</width><height>60</height><depth>3</depth></size>"
            f"{elements}</annotation>"
        )
