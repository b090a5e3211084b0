"""The configs shipped with this project: in a checkout, or inside an installed package."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def configs() -> Path:
    """The folder of the shipped configs.

    Raises:
        FileNotFoundError: it is neither beside the package (checkout) nor inside it (wheel).
    """
    for folder in (PACKAGE.parent / "configs", PACKAGE / "configs"):
        if (folder / "Base-FPN.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no folder of configs beside or inside {PACKAGE}: install fpn_ext again"
    )


def find_config(file: str) -> str:
    """The path of a config file: as given if it exists; else, under ``configs/``, the shipped one.

    >>> Path(find_config("configs/Base-FPN.yaml")).is_file()
    True
    >>> find_config("configs/none.yaml")
    'configs/none.yaml'
    """
    path = Path(file)
    if not path.exists() and path.parts[:1] == ("configs",):
        shipped = configs().joinpath(*path.parts[1:])
        if shipped.is_file():
            return str(shipped)
    return file
