"""Load of the machine while a stage runs, under the names of MLflow's system metrics."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]

SAMPLE_INTERVAL = 10.0  # seconds


class SystemMetricsMonitor(threading.Thread):
    """Thread that samples the load regularly and once at the end; `log(values, step)` gets each sample."""

    def __init__(self, log: Callable[[dict[str, float], int], None]) -> None:
        super().__init__(name="system metrics", daemon=True)
        self._log = log
        self._ended = threading.Event()
        self._step = 0
        self._own = psutil.Process()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call starts the measurement
        self.start()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_INTERVAL):
            self._sample()

    def stop(self) -> None:
        self._ended.set()
        self.join()
        self._sample()

    def _sample(self) -> None:
        try:
            values = self._load()
        except (psutil.Error, OSError, RuntimeError):
            values = {}  # a missing sample is no reason to stop
        self._log({f"system/{name}": round(value, 2) for name, value in values.items()}, self._step)
        self._step += 1

    def _load(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(".")
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": self._own.memory_info().rss / 1e6,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network is not None:  # None where there is no network at all
            values["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        return values | gpu_memory()


def gpu_memory() -> dict[str, float]:
    """Return each GPU's memory load, only where torch already uses one: asking earlier would take memory there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    values: dict[str, float] = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        values[f"gpu_{number}_memory_usage_megabytes"] = (total - free) / 1e6
        values[f"gpu_{number}_memory_usage_percentage"] = 100 * (1 - free / total)
    return values
