"""How long a thread waits for Python's lock while four others write JPEG files, by kind of file.

SERVE.md says why it matters: whoever draws asks for the lock at every call of torch.
"""

from __future__ import annotations

import io
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from serve.pictures import encode_picture

THREADS, LOOKS = 4, 300


def main() -> None:
    """Print the median wait in ms for a file in Python's memory and for the endpoint's."""
    small = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((512, 512), Image.Resampling.BICUBIC))

    def in_python() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "jpeg", quality=95, subsampling=0)
        return buffer.getvalue()

    for name, encode in (
        ("file in Python's memory", in_python),
        ("the endpoint's file", lambda: encode_picture(picture, "jpeg")),
    ):
        print(f"{name}: {1e3 * wait(encode):.2f} ms")


def wait(encode: Callable[[], bytes]) -> float:
    """Give the median seconds until a thread that gave the lock away has it again."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            encode()

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    waits = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        time.sleep(0)
        waits.append(time.perf_counter() - began)
    stop.set()
    for thread in threads:
        thread.join()
    return statistics.median(waits)


if __name__ == "__main__":
    main()
