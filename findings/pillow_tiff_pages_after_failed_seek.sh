#!/bin/sh
# Pillow 13.0.0: a TIFF has more pages once one was looked for that it does not have.
#
# Input: a TIFF of three pages that Pillow wrote itself, opened; seek(10), whose EOFError is caught,
# as code that looks for the last page does; then n_frames. GIF, WebP and APNG files of three frames
# beside it.
# Seen: n_frames is 11 for the TIFF, and 3 for the others; tell() is 2 for the TIFF, its last page,
# and 0 for the others, as before. With n_frames asked first, the TIFF has 3 as well. A loop over
# range(n_frames) then ends in the EOFError that was caught before. Expected: 3, and the page that
# the file stood at.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.10 to 3.14 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
if command -v uv >/dev/null; then
    uv venv -q --python "$python" "$work/venv"
    uv pip install -q --python "$work/venv/bin/python" pillow==13.0.0
else
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q pillow==13.0.0
fi
cd "$work"
"$work/venv/bin/python" - <<'END'
from PIL import Image

pages = [Image.new("L", (4, 3), 50 * number) for number in range(3)]
seen = {}
for suffix in ("tif", "gif", "webp", "png"):
    pages[0].save(f"three.{suffix}", save_all=True, append_images=pages[1:])
    with Image.open(f"three.{suffix}") as image:
        try:
            image.seek(10)
        except EOFError:
            seen[suffix] = (image.tell(), image.n_frames)
with Image.open("three.tif") as image:
    seen["tif, n_frames first"] = (image.n_frames,)
    try:
        image.seek(10)
    except EOFError:
        seen["tif, n_frames first"] += (image.n_frames,)
print("tell(), n_frames after seek(10) of three pages:", seen)
expected = {"tif": (2, 11), "gif": (0, 3), "webp": (0, 3), "png": (0, 3)}
if seen != expected | {"tif, n_frames first": (3, 3)}:
    raise SystemExit("Pillow 13.0.0 no longer behaves as described above")
END
echo "as described: a TIFF of three pages has eleven after seek(10)"
