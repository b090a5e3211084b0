"""PNG files of what this project draws, which say so: they may lie among photographs, and are none.

A drawing is known by the text ``Software`` of its PNG, under whatever name and in whatever folder.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, and readers of data need it not

SOFTWARE = "fpn-ext"
_CHUNK = b"tEXtSoftware\0" + SOFTWARE.encode()
_BEFORE_PIXELS = 1024  # bytes, in which both Pillow and Matplotlib have written it


def write_picture(picture: Image.Image, file: Path, **options: object) -> None:
    """Write a drawing, atomically.

    Args:
        options: of Pillow's PNG writer.

    Raises:
        OSError: as :func:`fpn_ext.files.atomic.replacing`.
    """
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    with replacing(file) as stream:
        picture.save(stream, "PNG", pnginfo=about, **options)


def write_figure(figure: "Figure", file: Path, dpi: int = 120) -> None:
    """Write a figure, atomically.

    Raises:
        OSError: as :func:`fpn_ext.files.atomic.replacing`.
    """
    with replacing(file) as stream:
        stream.write(png_of(figure, dpi))


def png_of(figure: "Figure", dpi: int = 120) -> bytes:
    """A figure as the content of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=dpi, format="png", metadata={"Software": SOFTWARE})
    return stream.getvalue()


def is_drawing(file: Path) -> bool:
    """Whether this module has written a file. No more than its first bytes are read."""
    try:
        if file.suffix.lower() != ".png" or not file.is_file():  # opening a pipe would block
            return False
        with file.open("rb") as stream:
            return _CHUNK in stream.read(_BEFORE_PIXELS)
    except (OSError, ValueError):
        return False
