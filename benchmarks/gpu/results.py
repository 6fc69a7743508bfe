"""The records of all calls of run.py that are kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.gpu.gates import failures
from benchmarks.gpu.runs import SUITES

Record = dict[str, Any]

REFERENCES = {run.key: {"reference": run.reference} for runs in SUITES.values() for run in runs}


class Results:
    """The records of all GPU calls, newest first."""

    def __init__(self, folder: Path) -> None:
        documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu*.json"))]
        self.documents = sorted(documents, key=lambda document: document["call"], reverse=True)
        found = {(r["key"], r["call"]): r for document in self.documents for r in document["runs"].values()}
        self.records = sorted(found.values(), key=lambda record: record["call"], reverse=True)

    def get(self, key: str, call: str | None = None) -> Record | None:
        """Return the record of a run whose numbers count: that of `call` if there is one, else the newest."""
        return self._of_calls(key, [] if call is None else [call])

    def beside(self, key: str, peers: Collection[str]) -> Record | None:
        """Return the newest record of a run that was measured in one call with any of `peers`, else the newest."""
        return self._of_calls(key, [record["call"] for peer in peers for record in self._kept(peer)])

    def _of_calls(self, key: str, calls: Collection[str]) -> Record | None:
        kept = self._kept(key)
        return next((record for record in kept if record["call"] in calls), kept[0] if kept else None)

    def _kept(self, key: str) -> list[Record]:
        """Return the records of a run whose numbers count, newest first."""
        return [record for record in self.records if record["key"] == key and not self.why_not(record)]

    def newest(self, key: str) -> Record | None:
        """Return the newest record of a run that has ended, whether or not its numbers count."""
        ended = [record for record in self.records if record["key"] == key and record["status"] == "done"]
        return ended[0] if ended else None

    def why_not(self, record: Record) -> list[str]:
        """Return why the numbers of `record` do not count; what a run is compared with is said in runs.py."""
        same_call = {other["key"]: other for other in reversed(self.records)}
        same_call |= {other["key"]: other for other in self.records if other["call"] == record["call"]}
        setting = {**record["setting"], **REFERENCES.get(record["key"], {})}
        return failures({**record, "setting": setting}, same_call)

    @property
    def matmul_flops(self) -> float | None:
        """The measured rate of matrix products of the newest call on a GPU."""
        rates = [document["ceilings"]["matmul_flops"] for document in self.documents if "ceilings" in document]
        return rates[0] if rates else None
