"""From which size on is it cheaper to point at a part than to copy it? ``python -m bench.crossover [--plot FILE]``.

Queues a batch of parts of one size and writes it with one ``sendmsg``: once with every part copied into the queue's
block, once with every part referenced. The time is of append and flush, per part; the receiving end is read outside it.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from pathlib import Path

from fastwire import FLUSH_DONE, WriteQueue

SIZES = tuple(1 << power for power in range(7, 18))
BATCH_BYTES = 128 * 1024
ROUNDS = 200


def one_batch(parts: list[bytes], threshold: int, ours: socket.socket, theirs: socket.socket) -> float:
    """Seconds to queue and write ``parts``."""
    queue = WriteQueue(copy_threshold=threshold)
    start = time.perf_counter()
    for part in parts:
        queue.append(part)
    status = queue.flush(ours.fileno())
    seconds = time.perf_counter() - start
    assert status == FLUSH_DONE
    left = queue.written
    while left:
        left -= len(theirs.recv(left))
    return seconds


def compare(size: int, ours: socket.socket, theirs: socket.socket) -> dict[str, float]:
    """Median microseconds a part, copied and referenced, in turn."""
    count = max(1, min(BATCH_BYTES // size, 200))
    parts = [bytes(size) for _ in range(count)]
    times: dict[int, list[float]] = {1 << 30: [], 0: []}
    for _ in range(ROUNDS):
        for threshold, seconds in times.items():
            seconds.append(one_batch(parts, threshold, ours, theirs))
    copied, referenced = (1e6 * statistics.median(seconds) / count for seconds in times.values())
    return {"size": size, "parts": count, "copied_us": copied, "referenced_us": referenced}


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    sizes = [row["size"] for row in rows]
    axes.plot(sizes, [row["copied_us"] for row in rows], "o-", label="copied into the block")
    axes.plot(sizes, [row["referenced_us"] for row in rows], "s-", label="referenced by an iovec")
    axes.axvline(8192, color="grey", linestyle=":", label="the threshold, 8 KiB")
    axes.set(xscale="log", yscale="log", xlabel="bytes of a part", ylabel="microseconds a part, queue and write")
    axes.set_xticks(sizes, [f"{size // 1024} K" if size >= 1024 else str(size) for size in sizes])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG or SVG")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        rows = [compare(size, ours, theirs) for size in SIZES]
    print(f"{'bytes':>8} {'copied us':>10} {'referenced us':>14} {'ratio':>6}")
    for row in rows:
        ratio = row["copied_us"] / row["referenced_us"]
        print(f"{row['size']:>8} {row['copied_us']:>10.2f} {row['referenced_us']:>14.2f} {ratio:>6.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
