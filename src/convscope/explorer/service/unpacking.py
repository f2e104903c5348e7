"""The process behind `uploads.Decoder`: files' bytes in, pixels out, until the input ends."""

from __future__ import annotations

import io
import os
import sys

from convscope.errors import ConvscopeError
from convscope.explorer.service.uploads import receive, send
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing

ROOM = 2 << 30  # bytes that decoding one picture may take


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a decoder prints does not get among the answers
    bound_memory(ROOM)
    while True:
        try:
            head, content = receive(sys.stdin.buffer)
        except EOFError:
            return
        if not content:
            send(answers, {})  # ready
            continue
        try:
            pixels = ImageBatchLoader([io.BytesIO(content)], Preprocessing(), max_pixels=head["pixels"]).original(0)
        except ConvscopeError as error:
            send(answers, {"error": str(error).removeprefix("image 0: ")})
        except MemoryError:
            send(answers, {"error": "takes too much memory"})
        else:
            send(answers, {"shape": pixels.shape}, pixels.tobytes())


def bound_memory(room: int) -> None:
    """No more than `room` bytes beyond what the process has now, on systems that can be told so."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))


if __name__ == "__main__":
    main()
