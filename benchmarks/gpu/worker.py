"""Run cases in processes of their own, so that a kernel that crashes or hangs costs one case.

    supervisor -> worker   {"case": name}                         a line of JSON on stdin
    worker -> supervisor   {"ready": true}, then {"row": …, "broken": …}      a line each on its first stdout

``broken``: the CUDA context does not answer any more; the worker ends and another one takes its place. What libraries
print goes to stderr, which the supervisor keeps for the reason of a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, Any

from .session import ROOT, GpuCase, Row, Session, Settings, end_group, execute

START_LIMIT_S = 120.0


def main() -> None:
    """``python3 -m resnet_fast.benchmarks.gpu.worker MODULE SETTINGS``."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = Settings(**json.loads(sys.argv[2]))
    import torch

    torch.set_num_threads(2 if settings.on_gpu else 1)  # other workers run at the same time
    cases: dict[str, GpuCase] = {case.name: case for case in importlib.import_module(sys.argv[1]).cases(settings)}

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    answer(ready=True)
    for line in sys.stdin:
        row = execute(cases[json.loads(line)["case"]])
        broken = settings.on_gpu and not _answers()
        answer(row=row, broken=broken)
        if broken:
            os._exit(1)  # the context's destructors would hang or crash


def end_with_parent() -> None:
    """End with the supervisor, also where it is killed: no worker may write to a table that the next run reads."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux


def _answers() -> bool:
    """Whether the GPU still works in this process; after an illegal access nothing does."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    ready: bool = False
    case: GpuCase | None = None
    since: float = field(default_factory=time.monotonic)
    unread: bytes = b""

    def limit(self) -> float:
        """Return when it counts as hanging, by the monotonic clock."""
        return self.since + (self.case.limit_s if self.case else START_LIMIT_S)

    def busy(self) -> bool:
        return self.case is not None or not self.ready

    def begin(self, case: GpuCase) -> None:
        assert self.process.stdin is not None
        self.case, self.since = case, time.monotonic()
        try:
            self.process.stdin.write(json.dumps({"case": case.name}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone: the end of its stdout says so

    def last_words(self) -> str:
        """Return the last line on stderr."""
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else ""


class WorkerPool:
    """Up to ``size`` workers for the cases of ``module``. They outlive a call of :meth:`run`; ``close`` ends them."""

    def __init__(self, module: str, session: Session, size: int = 1) -> None:
        self.module, self.session, self.size = module, session, size
        self.workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            self._end(worker)
        self.workers.clear()

    def run(self, cases: list[GpuCase]) -> None:
        """Run every case once, in this order, and record each row at once; note what the budget cuts off."""
        session, queue = self.session, list(cases)
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            while True:
                queue = self._hand_out(queue, selector)
                busy = [w for w in self.workers if w.busy()]
                if not any(w.case for w in busy) and not queue:
                    return
                wait = min([session.clock.left, *(w.limit() - time.monotonic() for w in busy)])
                for event, _ in selector.select(max(0.0, wait)):
                    self._read(event.data, selector)
                for worker in [w for w in self.workers if w.busy() and time.monotonic() > w.limit()]:
                    self._hangs(worker, selector)
                if session.clock.left <= 0:
                    cut = [w for w in self.workers if w.case]
                    session.left += [w.case.name for w in cut if w.case] + [case.name for case in queue]
                    for worker in cut:
                        self._drop(worker, selector)
                    return

    def _hand_out(self, queue: list[GpuCase], selector: selectors.BaseSelector) -> list[GpuCase]:
        """Give idle workers work, and start workers while there is more work than workers."""
        session = self.session
        affordable = [case for case in queue if case.needs_s <= session.clock.left]
        session.left += [case.name for case in queue if case.needs_s > session.clock.left]
        for worker in self.workers:
            if affordable and not worker.busy():
                worker.begin(affordable.pop(0))
        while len([w for w in self.workers if not w.ready]) < len(affordable) and len(self.workers) < self.size:
            worker = self._start()
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        return affordable

    def _start(self) -> _Worker:
        log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker lives
        command = [sys.executable, "-m", f"{__package__}.worker", self.module, self.session.settings.to_json()]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        worker = _Worker(process, log)
        self.workers.append(worker)
        return worker

    def _read(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        assert worker.process.stdout is not None
        piece = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not piece:
            return self._died(worker, selector)
        *lines, worker.unread = (worker.unread + piece).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("ready"):
                worker.ready = True
                continue
            assert worker.case is not None
            case, worker.case = worker.case, None
            self.session.record(case.name, message["row"])
            if message["broken"]:
                self._drop(worker, selector)

    def _died(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        code, words = worker.process.wait(), worker.last_words()
        self._drop(worker, selector)
        reason = f"the process ended with exit code {code}" + (f": {words}" if words else "")
        if worker.case is None:
            raise RuntimeError(f"a worker of {self.module} did not start: {reason}")
        self.session.record(worker.case.name, _failed(worker, reason))

    def _hangs(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        self._drop(worker, selector)
        if worker.case is None:
            raise RuntimeError(f"a worker of {self.module} did not start within {START_LIMIT_S:.0f} s")
        self.session.record(worker.case.name, _failed(worker, f"no answer within {worker.case.limit_s:.0f} s"))

    def _drop(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        self.workers.remove(worker)
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        end_group(worker.process)
        for pipe in (worker.process.stdin, worker.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        worker.log.close()


def _failed(worker: _Worker, reason: str) -> Row:
    return {"status": "failed", "error": reason, "seconds": round(time.monotonic() - worker.since, 3)}


if __name__ == "__main__":
    main()
