"""examples/serve.py with a real client on loopback: answers, what is refused, shared batches."""

import http.client
import importlib.util
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fpn_ext
import numpy as np
import pytest
from PIL import Image
from tiny import CLASSES, photo, register, saved_run

pytest.importorskip("fastapi", reason="FastAPI, the extra serve, is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn, the extra serve, is not installed")

spec = importlib.util.spec_from_file_location("serve", "examples/serve.py")
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)

LIMITS = {"max_bytes": 100_000, "max_pixels": 10_000, "max_waiting": 5}


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    register(root / "tiny")
    return fpn_ext.Detector.load(saved_run(root / "mine"), batch_size=4)


@pytest.fixture(scope="module")
def service(detector):
    """(app, port) of a service that runs in a thread of this process."""
    app = serve.build_app(detector, **LIMITS)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield app, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(port, body, path="/detect?min_score=0", chunked=False):
    """(status, what the JSON says)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    method = "GET" if body is None else "POST"
    headers = {"Transfer-Encoding": "chunked"} if chunked else {}
    connection.request(method, path, body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    said = json.loads(answer.read())
    connection.close()
    return answer.status, said


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_it_answers_what_the_detector_finds(service, detector):
    _, port = service
    status, said = ask(port, png(photo()))
    found = detector(photo())
    assert status == 200 and (said["width"], said["height"]) == (64, 48)
    assert [{k: v for k, v in one.items() if k != "category"} for one in said["detections"]] == (
        found.to_coco()
    )
    assert [one["category"] for one in said["detections"]] == found.class_names
    best = float(found.scores[1])
    assert len(ask(port, png(photo()), f"/detect?min_score={best}")[1]["detections"]) == 2
    status, said = ask(port, None, "/classes")
    assert status == 200 and [one["name"] for one in said] == CLASSES


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 415, "no image that can be read"),
        (b"not an image", 415, "no image that can be read (JPEG, PNG, WEBP, BMP, TIFF)"),
        (png(photo())[:200], 415, "no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "no image that can be read"),
        (bytes(100_001), 413, "an upload may have 100000 bytes"),
        (png(np.zeros((101, 100, 3), np.uint8)), 413, "10000 pixels, this one is 100 x 101"),
    ],
)
def test_what_is_refused(service, body, status, said):
    _, port = service
    answered, message = ask(port, body)
    assert answered == status and said in message["detail"]
    assert ask(port, png(photo()))[0] == 200  # and it goes on


def test_an_image_that_the_model_does_not_take_leaves_its_batch_alone(service, detector):
    """Two that wait together: one of floating point, whose range the model does not know."""
    file = io.BytesIO()
    Image.new("F", (64, 48)).save(file, "TIFF")
    infer, may_go_on, _, port = detector.model.infer, threading.Event(), *service
    with ThreadPoolExecutor(3) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.model, "infer", lambda inputs: may_go_on.wait(60) and infer(inputs))
        first = pool.submit(ask, port, png(photo()))
        time.sleep(0.3)  # until it is being run
        refused = pool.submit(ask, port, file.getvalue())
        good = pool.submit(ask, port, png(photo(seed=1)))
        time.sleep(0.3)  # until the uploads are decoded
        may_go_on.set()
        assert first.result()[0] == good.result()[0] == 200
    status, said = refused.result()
    assert status == 422 and "floating point has no range" in said["detail"]
    assert len(good.result()[1]["detections"]) == len(detector(photo(seed=1)))


def test_a_body_that_does_not_say_its_length_is_bounded_too(service):
    _, port = service
    chunks = (bytes(40_000) for _ in range(3))
    assert ask(port, chunks, chunked=True)[0] == 413


def test_a_score_that_is_none(service):
    assert ask(service[1], png(photo()), "/detect?min_score=2")[0] == 422


def test_requests_at_the_same_time_are_one_batch_and_too_many_are_told_so(
    service, detector, monkeypatch
):
    app, port = service
    wait_until(lambda: app.state.waiting == 0)
    sizes, may_go_on = [], threading.Event()
    infer = detector.model.infer

    def held(inputs):
        may_go_on.wait(60)
        sizes.append(len(inputs))
        return infer(inputs)

    monkeypatch.setattr(detector.model, "infer", held)
    with ThreadPoolExecutor(5) as pool:
        try:
            first = pool.submit(ask, port, png(photo(seed=0)))
            time.sleep(0.3)  # until it is being run
            others = [pool.submit(ask, port, png(photo(seed=seed))) for seed in range(1, 5)]
            wait_until(lambda: app.state.waiting == 5)
            status, said = ask(port, png(photo()))
            assert status == 503 and said["detail"] == "5 requests wait"
            time.sleep(0.3)  # until the uploads are decoded
        finally:
            may_go_on.set()
        answers = [first.result(), *(other.result() for other in others)]
    assert sizes == [1, 4]
    monkeypatch.undo()
    for seed, (status, said) in enumerate(answers):
        found = detector(photo(seed=seed))
        assert status == 200
        np.testing.assert_allclose(
            [o["score"] for o in said["detections"]], found.scores, atol=1e-5
        )
