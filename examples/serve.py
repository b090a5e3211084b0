"""A detector over HTTP: `POST /detect` with the bytes of an image, COCO annotations back.

    python examples/serve.py --run output/mine --port 8000
    curl --data-binary @photo.jpg "http://127.0.0.1:8000/detect?min_score=0.5"

Requests that wait at the same time are run as a batch. Needs FastAPI and uvicorn:
pip install -e '.[serve]' in this project's folder. There is no authentication: it listens on this
machine alone unless --host says otherwise; put a proxy of yours in front of it.

An upload is read as JPEG, PNG, WebP, BMP or TIFF and as nothing else. Refused before it is decoded:
one of too many bytes or pixels (413), one that is no image (415), and any at all while too many
wait (503). An image that the model does not take, as it is too thin to be resized, gets a 422.
"""

import argparse
import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from typing import Any

import fpn_ext
from PIL import Image

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError(
        f"examples/serve.py needs FastAPI and uvicorn ({error}): pip install -e '.[serve]' in this "
        "project's folder, or pip install fastapi uvicorn"
    ) from error

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # Pillow would also hand PostScript to a program
GATHER_S = 0.005  # how long a request waits for others to share its batch


def build_app(
    detector: fpn_ext.Detector,
    max_bytes: int = 20_000_000,
    max_pixels: int = 25_000_000,
    max_waiting: int = 16,
) -> FastAPI:
    """The service.

    Args:
        detector: run by one task, in batches of ``detector.batch_size``.
        max_bytes: of an upload.
        max_pixels: of an image, decoded: 3 bytes each.
        max_waiting: requests at a time; further ones are told to come again.
    """
    queue: asyncio.Queue[tuple[Image.Image, asyncio.Future[Any]]] = asyncio.Queue()

    async def run_batches() -> None:
        while True:
            batch = [await queue.get()]
            await asyncio.sleep(GATHER_S)
            while len(batch) < detector.batch_size and not queue.empty():
                batch.append(queue.get_nowait())
            try:
                found = await run_in_threadpool(detector, [image for image, _ in batch])
            except Exception:  # of one image, for which the others are not to suffer
                found = [await run_in_threadpool(found_or_error, image) for image, _ in batch]
            for (_, answer), result in zip(batch, found, strict=True):
                if answer.done():  # the client has left
                    continue
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)

    def found_or_error(image: Image.Image) -> Any:
        try:
            return detector(image)
        except Exception as error:
            return error

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(run_batches())
        yield
        task.cancel()

    app = FastAPI(title="fpn_ext detector", lifespan=lifespan)
    app.state.waiting = 0

    @app.get("/classes")
    async def classes() -> list[dict[str, Any]]:
        return [{"id": id, "name": name} for id, name in detector.categories.items()]

    @app.post("/detect")
    async def detect(request: Request, min_score: float = Query(0.5, ge=0, le=1)) -> dict[str, Any]:
        if app.state.waiting >= max_waiting:
            raise HTTPException(503, f"{max_waiting} requests wait", {"Retry-After": "1"})
        app.state.waiting += 1
        try:
            image = await run_in_threadpool(decoded, await body_of(request, max_bytes), max_pixels)
            answer = asyncio.get_running_loop().create_future()
            queue.put_nowait((image, answer))
            found = await answer
        except ValueError as error:  # an image that the model does not take
            raise HTTPException(422, str(error)) from error
        finally:
            app.state.waiting -= 1
        found = found[found.scores >= min_score]
        named = zip(found.to_coco(), found.class_names, strict=True)
        detections = [{**annotation, "category": name} for annotation, name in named]
        return {"width": found.width, "height": found.height, "detections": detections}

    return app


async def body_of(request: Request, max_bytes: int) -> bytes:
    """The body of a request, of which no more is read than may be."""
    too_long = HTTPException(413, f"an upload may have {max_bytes} bytes")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_long
    except ClientDisconnect:
        raise HTTPException(400, "the upload was broken off") from None
    return bytes(body)


def decoded(body: bytes, max_pixels: int) -> Image.Image:
    """An upload as a picture; its size is looked at before it is decoded."""
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise HTTPException(
                413, f"an image may have {max_pixels} pixels, this one is {width} x {height}"
            )
        image.load()
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"an image may have {max_pixels} pixels: {error}") from error
    except HTTPException:
        raise
    except Exception as error:  # decoders raise what they like
        raise HTTPException(
            415, f"no image that can be read ({', '.join(FORMATS)}): {error}"
        ) from error
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="folder of a training, or its model.onnx"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=4, help="images run at once")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="of an upload")
    parser.add_argument("--max-pixels", type=int, default=25_000_000, help="of an image")
    args = parser.parse_args()
    detector = fpn_ext.Detector.load(args.run, batch_size=args.batch_size)
    app = build_app(detector, args.max_bytes, args.max_pixels)
    uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=64)


if __name__ == "__main__":
    main()
