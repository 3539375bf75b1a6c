"""What listing a large prefix on S3 costs: seconds and memory of this process, over HTTP.

    python -m tests.bench.s3_listing 10000 100000

A process of its own answers ListObjectsV2 page by page (moto's time grows with the square of the
number of objects, and would be all that is seen). Prints a JSON line a number of objects: listing,
and grouping into concepts of five photos, as a check does before it reads any.
"""

from __future__ import annotations

import bisect
import json
import multiprocessing
import os
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from urllib.parse import parse_qs, urlsplit

BUCKET = "many"
PHOTOS = 5


def serve(count: int, pipe: Connection) -> None:
    """Serves the listing of a bucket of so many objects until told to stop."""
    keys = [f"photos/concept-{n // PHOTOS:06d}/{n % PHOTOS}.jpg" for n in range(count)]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = {name: value[0] for name, value in parse_qs(urlsplit(self.path).query).items()}
            body = page(keys, asked.get("prefix", ""), asked.get("continuation-token", ""))
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(f"http://127.0.0.1:{server.server_port}")
    pipe.recv()
    server.shutdown()


def page(keys: list[str], prefix: str, token: str) -> bytes:
    """Gives one answer to ListObjectsV2: at most a thousand of the sorted keys."""
    first = bisect.bisect_right(keys, token) if token else bisect.bisect_left(keys, prefix)
    found = [key for key in keys[first : first + 1000] if key.startswith(prefix)]
    more = len(found) == 1000 and first + 1000 < len(keys)
    facts = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>1</Size>"
    etag = "<ETag>&quot;9dd4e461268c8034f5c8564e155c67a6&quot;</ETag>"
    items = "".join(f"<Contents><Key>{key}</Key>{facts}{etag}</Contents>" for key in found)
    rest = f"<NextContinuationToken>{found[-1]}</NextContinuationToken>" if more else ""
    head = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(found)}</KeyCount>"
    return f"<ListBucketResult>{head}{rest}{items}</ListBucketResult>".encode()


def measure(count: int) -> dict[str, float]:
    """Lists a prefix of so many objects."""
    from components.ingest import store
    from components.ingest.concept_folder import _by_folder

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(count, theirs))
    server.start()
    os.environ["AWS_ENDPOINT_URL"] = ours.recv()
    try:
        list(store.list_folder(f"s3://{BUCKET}/photos/concept-000000"))  # loads what is needed
        clock, cpu = time.perf_counter(), time.process_time()
        entries = store.list_folder(f"s3://{BUCKET}/photos", depth=2, empty=True)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        grouping = time.perf_counter()
        folders = _by_folder(entries)
        grouping = time.perf_counter() - grouping
        assert len(entries) == count and len(folders) == -(-count // PHOTOS)
        del entries, folders
        tracemalloc.start()
        kept = store.list_folder(f"s3://{BUCKET}/photos", depth=2, empty=True)
        size, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del kept
    finally:
        ours.send("stop")
        server.join()
    return {
        "objects": count,
        "clock_s": round(clock, 2),
        "own_cpu_s": round(cpu, 2),
        "group_s": round(grouping, 3),
        "entries_mib": round(size / 2**20, 1),
        "peak_mib": round(peak / 2**20, 1),
    }


def main() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ.update({**keys, "AWS_DEFAULT_REGION": "us-east-1"})
    for count in map(int, sys.argv[1:] or ("10000", "100000")):
        print(json.dumps(measure(count)), flush=True)


if __name__ == "__main__":
    main()
