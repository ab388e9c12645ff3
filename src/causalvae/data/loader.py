"""Batches of clips in the order of their cursor, decoded ahead of the training."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from types import TracebackType

import torch

from causalvae.data.clips import ClipPlan, Clips, Slot, SlotReader
from causalvae.data.sources import ClipSource
from causalvae.data.workers import SIGNALS, WorkerPool
from causalvae.errors import CausalVAEError, ConfigError, RunError

READY_BATCHES = 2  # decoded and waiting for the training
WAKE_SECONDS = 0.2  # how often a full queue is looked at again

Quarantine = Callable[[dict[str, str]], None]


class ClipLoader:
    """An endless iterator over batches from a cursor on. A context manager: leaving it ends the workers.

    workers: processes; 0 decodes in a thread of this process, which can't be stopped if a file hangs it.
    clip_timeout: seconds for one video. quarantined: ids of videos known to be broken, with the reason.
    on_quarantine: told `video` and `reason` when a batch that is handed out met a broken video for the first time.
    """

    def __init__(
        self,
        source: ClipSource,
        plan: ClipPlan,
        *,
        cursor: int = 0,
        workers: int = 0,
        clip_timeout: float = 60.0,
        quarantined: Mapping[str, str] | None = None,
        on_quarantine: Quarantine | None = None,
    ) -> None:
        known = dict(quarantined or {})
        self.source, self.plan = source, plan
        self._on_quarantine, self._recorded = on_quarantine, set(known)
        self._pool = WorkerPool(source, plan, known=known, timeout=clip_timeout)
        self._stop = self._pool.stop
        self._ready: queue.Queue[list[Slot] | CausalVAEError] = queue.Queue(READY_BATCHES)
        self._wait = 0.0
        slots = self._pool.slots(cursor, workers=workers) if workers else self._inline(cursor, known)
        self._thread = threading.Thread(target=self._feed, args=(slots,), name="clips", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Clips]:
        return self

    def __next__(self) -> Clips:
        """The next batch. ConfigError if no video can be used."""
        started = time.monotonic()
        batch = self._ready.get()
        self._wait += time.monotonic() - started
        if isinstance(batch, CausalVAEError):
            raise batch
        for slot in batch:
            self._record(slot)
        filled = [(slot.pixels, slot.request) for slot in batch]
        pixels = [pixels for pixels, _ in filled if pixels is not None]
        if len(pixels) < len(batch):
            raise self._nothing_usable(next(slot for slot in batch if slot.pixels is None))
        requests = tuple(request for _, request in filled if request is not None)
        return Clips(torch.stack(pixels), requests, batch[0].cursor)

    def take_wait(self) -> float:
        """Seconds that the caller waited for data since this was last asked."""
        waited, self._wait = self._wait, 0.0
        return waited

    def close(self) -> None:
        """End the workers and the feeding thread."""
        self._stop.set()
        self._thread.join()

    def _inline(self, cursor: int, known: dict[str, str]) -> Iterator[Slot]:
        reader = SlotReader(self.source, self.plan, announce=lambda video: None)  # noqa: ARG005  nobody listens
        reader.bad.update(known)
        for c in count(cursor):
            for s in range(self.plan.batch):
                yield reader.fill(c, s)

    def _feed(self, slots: Iterator[Slot]) -> None:
        """The feeding thread: slots to batches, as far ahead as there is room."""
        # Signals are the main thread's. Processes started here inherit the mask, so that one sent to the whole group
        # does not end them in the middle of the last step.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        batch: list[Slot] = []
        failure: CausalVAEError | None = RunError("reading clips ended with a bug, see the lines above", status=1)
        try:
            for slot in slots:
                batch.append(slot)
                if len(batch) == self.plan.batch:
                    self._offer(batch)
                    batch = []
                if self._stop.is_set():
                    break
            failure = None
        except CausalVAEError as error:
            failure = error
        finally:
            if failure is not None:
                self._offer(failure)

    def _offer(self, item: list[Slot] | CausalVAEError) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=WAKE_SECONDS)
            except queue.Full:
                continue

    def _record(self, slot: Slot) -> None:
        for video, reason in slot.bad:
            if video not in self._recorded:
                self._recorded.add(video)
                if self._on_quarantine is not None:
                    self._on_quarantine({"video": video, "reason": reason})

    def _nothing_usable(self, slot: Slot) -> ConfigError:
        reasons = "; ".join(reason for _, reason in slot.bad[:3])
        name, plan = self.source.name, self.plan
        if slot.num_short and not slot.bad:
            return ConfigError(
                f"--video_path {name}: all videos are shorter than {plan.span} frames; lower --video_num_frames, or "
                "use --short_videos auto to repeat last frames"
            )
        return ConfigError(
            f"--video_path {name}: none of the {len(self.source)} videos can be used. The first reasons: {reasons}"
        )
