"""Time on one device, inside CUDA graphs and out of them, and the line that says what was measured."""

import json
import platform
import statistics
import time
from pathlib import Path

import torch

_TURNS = 256 << 20  # bytes of inputs that take turns: several times what a chip caches


class Timer:
    """Medians of a function's time, on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, function) -> float:
        """Seconds of one call, after warm-up; long calls are repeated for a second, three times at least."""
        for _ in range(3):
            function()
        times = []
        while len(times) < self.repeats and (len(times) < 3 or sum(times) < 1):
            self._wait()
            start = time.perf_counter()
            function()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def captured(self, functions: list, calls: int = 20) -> float:
        """Seconds of one call as it runs inside a CUDA graph, where launches cost next to nothing; they take turns."""
        if self.device.type != "cuda":
            return self(functions[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # what the functions read may still be on its way
        with torch.cuda.stream(stream):
            functions[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                functions[i % len(functions)]()
        return self(graph.replay) / calls

    def steps(self, steps: list, batch: int) -> float:
        """Seconds of one step of decoding; each fills its counts first, whose time is taken off."""
        fill = torch.zeros(batch + 1, dtype=torch.int32, device=self.device)
        return self.captured(steps) - self.captured([lambda: fill.fill_(0)])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def bandwidth(timer: Timer, nbytes: int = 2**31) -> float:
    """Bytes a second that a sum over a large tensor reads."""
    data = torch.ones(nbytes // 4 if timer.device.type == "cuda" else 2**22, device=timer.device)
    return data.nbytes / timer(data.sum)


def sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs take turns, so that no call finds its own in the chip's cache."""
    return min(20, 1 + (_TURNS // nbytes if device.type == "cuda" else 0))


def write_line(out: Path | None, found: dict, device: torch.device, **more) -> None:
    """Prints what was found as one JSON line, with the hardware, and appends it to a file if there is one."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    line = json.dumps({**found, "hardware": {"device": name, "torch": torch.__version__, **more}})
    if out:
        with out.open("a") as file:
            file.write(line + "\n")
    print(line)
